#!/usr/bin/env bash
# A release as it will be, without the upload: source archive and wheel, twine's check, an index on
# this machine, and an install from it that runs outside the checkout.
#
#   packaging/release_check.sh OUT
#
# OUT/dist holds the files afterwards. PYTHON (python3) needs torch, numpy, build, twine and the tools of
# [build-system] in pyproject.toml. Without PYLOSS_CMAKE_ARGS the wheel has no CUDA kernels.
set -euo pipefail

out=${1:?usage: packaging/release_check.sh OUT}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYLOSS_CMAKE_ARGS=${PYLOSS_CMAKE_ARGS:--DPYLOSS_CUDA=OFF}
if [ -e "$out" ] && [ ! -f "$out/.release-check" ]; then
  echo "$out is there, and is not of an earlier run" >&2
  exit 2
fi
rm -rf "$out"
mkdir -p "$out/index/pyloss"
touch "$out/.release-check"
out=$(cd "$out" && pwd)

say() { printf '\n== %s\n' "$*"; }

say "source archive, and a wheel from it"
# The wheel is built from the unpacked archive, in a new folder under OUT; without its path in them
# ccache knows the objects of a build elsewhere.
export TMPDIR=$out CCACHE_NOHASHDIR=1 CCACHE_BASEDIR=$out
(cd "$out" && "$python" -m build --no-isolation --outdir "$out/dist" "$root") > "$out/build.log" 2>&1 \
  || { tail -n 40 "$out/build.log"; exit 1; }
ls -l "$out/dist"

say "twine check"
"$python" -m twine check --strict "$out"/dist/*

say "an index on this machine"
cp "$out"/dist/* "$out/index/pyloss/"
"$python" - "$out/index" <<'EOF'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
(root / "index.html").write_text('<!DOCTYPE html><a href="pyloss/">pyloss</a>\n')
links = [
    f'<a href="{p.name}#sha256={hashlib.sha256(p.read_bytes()).hexdigest()}">{p.name}</a>'
    for p in sorted((root / "pyloss").iterdir())
]
(root / "pyloss" / "index.html").write_text("<!DOCTYPE html>" + "<br>".join(links) + "\n")
EOF
"$python" -u -m http.server 0 --bind 127.0.0.1 --directory "$out/index" > "$out/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
port=
for _ in $(seq 100); do
  port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$out/server.log")
  [ -n "$port" ] && break
  sleep 0.1
done
: "${port:?the server did not start}"

say "an install from it, in a fresh environment"
"$python" -m venv "$out/venv"
# No other source of packages: neither settings nor variables of this machine.
env -i PATH="$PATH" HOME="$out" PIP_CONFIG_FILE=/dev/null "$out/venv/bin/python" -m pip install \
  --disable-pip-version-check --no-cache-dir --no-deps --index-url "http://127.0.0.1:$port" pyloss
# torch and numpy from the environment of PYTHON, after what is installed here.
"$out/venv/bin/python" - "$("$python" -c 'import torch; print(torch.__path__[0])')" <<'EOF'
import pathlib, sys, sysconfig

(pathlib.Path(sysconfig.get_paths()["purelib"]) / "torch.pth").write_text(
    str(pathlib.Path(sys.argv[1]).parent) + "\n"
)
EOF
(cd "$out/venv" && env -u PYTHONPATH "$out/venv/bin/python" - <<'EOF'
import importlib.metadata, pathlib, sys
import torch, pyloss

home = pathlib.Path(pyloss.__file__)
assert home.is_relative_to(sys.prefix), home
assert importlib.metadata.version("pyloss") == pyloss.__version__ == pyloss._C.version
x = torch.randn(64, 1000, requires_grad=True)
y = torch.randint(1000, (64,))
loss = pyloss.fused_cross_entropy(x, y)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y))
pyloss.ops.load_all()
pyloss.show_config()
EOF
)
say "done: $out/dist"
