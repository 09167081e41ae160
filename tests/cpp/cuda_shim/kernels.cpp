// What the compiler knows of a kernel, and nobody asks a compiler for C++: read from the program.
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "runtime.h"
#include "shim.h"

namespace {

struct Function {
  uintptr_t address;
  std::string name;
};
struct Variable {
  std::string name;
  size_t bytes;
};
struct Symbols {
  std::vector<Function> functions;  // by address
  std::vector<Variable> shared;     // thread_local ones
};

std::vector<char> contents(const char* path) {
  std::vector<char> bytes;
  if (std::FILE* file = std::fopen(path, "rb")) {
    std::fseek(file, 0, SEEK_END);
    bytes.resize(size_t(std::ftell(file)));
    std::rewind(file);
    if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) bytes.clear();
    std::fclose(file);
  }
  return bytes;
}

void read_symbols(const std::vector<char>& file, uintptr_t base, Symbols* all) {
  if (file.size() < sizeof(ElfW(Ehdr))) return;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[s].sh_link].sh_offset;
    const auto* symbol = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[s].sh_offset);
    for (size_t left = sections[s].sh_size / sizeof *symbol; left > 0; --left, ++symbol) {
      const int type = symbol->st_info & 15;
      if (symbol->st_shndx == SHN_UNDEF) continue;
      if (type == STT_FUNC)
        all->functions.push_back({base + symbol->st_value, names + symbol->st_name});
      if (type == STT_TLS) all->shared.push_back({names + symbol->st_name, symbol->st_size});
    }
  }
  std::sort(all->functions.begin(), all->functions.end(),
            [](const Function& a, const Function& b) { return a.address < b.address; });
}

// Of the program, or of the module, that this file is linked into.
int read_own(dl_phdr_info* info, size_t, void* all) {
  const auto here = reinterpret_cast<uintptr_t>(&shim::settings);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t at = info->dlpi_addr + header.p_vaddr;
    if (header.p_type != PT_LOAD || here < at || here >= at + header.p_memsz) continue;
    const char* path = info->dlpi_name[0] ? info->dlpi_name : "/proc/self/exe";
    read_symbols(contents(path), info->dlpi_addr, static_cast<Symbols*>(all));
    return 1;
  }
  return 0;
}

const Symbols& symbols() {
  static const Symbols found = [] {
    Symbols all;
    dl_iterate_phdr(read_own, &all);
    return all;
  }();
  return found;
}

// Variables of a function have its name in theirs: _ZZ, the name without its _Z, E, their own.
size_t shared_bytes_of(const void* kernel) {
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  const auto& functions = symbols().functions;
  auto f = std::lower_bound(functions.begin(), functions.end(), address,
                            [](const Function& a, uintptr_t b) { return a.address < b; });
  size_t bytes = 0;
  for (; f != functions.end() && f->address == address; ++f) {
    if (f->name.compare(0, 2, "_Z") != 0) continue;
    const std::string prefix = "_ZZ" + f->name.substr(2) + "E";
    for (const Variable& v : symbols().shared) {
      if (v.name.compare(0, prefix.size(), prefix) == 0) bytes += v.bytes;
    }
    if (bytes > 0) break;  // another name of the same function
  }
  return bytes;
}

unsigned bound_of(const void* kernel) {
#if defined(__x86_64__)
  const auto* code = static_cast<const unsigned char*>(kernel);
  static const unsigned char kBranchTarget[] = {0xf3, 0x0f, 0x1e, 0xfa};
  if (std::equal(kBranchTarget, kBranchTarget + 4, code)) code += 4;
  unsigned threads = 0;
  while (threads < shim::kMaxThreads && code[threads] == 0x90) ++threads;
#else
  const auto* code = static_cast<const uint32_t*>(kernel);
  unsigned threads = 0;
  while (threads < shim::kMaxThreads && code[threads] == 0xd503201fu) ++threads;
#endif
  return threads > 0 ? threads : shim::kMaxThreads;
}

}  // namespace

namespace shim {

Kernel kernel_at(const void* kernel) {
  static std::map<const void*, Kernel> known;
  if (!kernel) return {kMaxThreads, 0};
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  return known[kernel] = {bound_of(kernel), shared_bytes_of(kernel)};
}

}  // namespace shim
