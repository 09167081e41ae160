// What the boundaries of the ops on rows of logits share: [outer][classes][inner] with strides.
#pragma once

#include <cstdint>

#include "bind/args.h"
#include "common/row_softmax.h"

namespace pyloss {

// Strides of a field that has the shape of the logits.
template <class Record, class P>
Strides strides(const Reader<Record>& r, typename Record::Field f, const P& p) {
  const auto s = r.template strides<3>(f, {p.outer, p.classes, p.inner});
  return {s[0], s[1], s[2]};
}

// Sizes, dtype and the logits themselves; returns how many they are.
template <class Record, class P>
int64_t decode_logits(const Reader<Record>& r, P& p) {
  const auto sizes = r.template integers<3>(Record::sizes);
  p.outer = sizes[0];
  p.classes = sizes[1];
  p.inner = sizes[2];
  const int64_t n = checked_count("input", {p.outer, p.classes, p.inner});
  const int64_t rows = checked_count("target", {p.outer, p.inner});
  if (p.classes > INT32_MAX) r.bad(Record::sizes, "more than 2^31 - 1 classes");
  if (p.classes == 0 && rows > 0) r.bad(Record::sizes, "rows without classes");
  p.dtype = r.floating(Record::dtype);
  p.x = r.pointer(Record::x, n);
  p.x_strides = strides(r, Record::x_strides, p);
  return n;
}

// A class index for each row.
template <class Record, class P>
void decode_labels(const Reader<Record>& r, P& p) {
  p.target = r.pointer(Record::target, p.rows());
  p.target_dtype = r.dtype(Record::target_dtype);
  if (is_float(p.target_dtype)) r.bad(Record::target_dtype, "not an integer dtype");
  p.ignore_index = r.integer(Record::ignore_index);
}

}  // namespace pyloss
