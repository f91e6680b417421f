// Several vectors of simd.h behind the operators of one. Included by simd.h alone, which says for
// which instruction set.
#ifndef DIFFMIC_CPU_SIMD_PACK_H_
#define DIFFMIC_CPU_SIMD_PACK_H_

namespace diffmic::cpu::DIFFMIC_SIMD {

// kCount vectors. What is written of one goes through their chains of operations side by side: of a
// chain alone the scheduler holds too few operations that can begin.
template <int kCount>
struct Pack {
  Vec v[kCount];

  template <typename Operation>
  static Pack Each(const Operation& operation) {
    Pack all;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) all.v[i] = operation(i);
    return all;
  }
};
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator+(const Pack<kCount>& a, Vec b) {
  return Pack<kCount>::Each([&](int i) { return a.v[i] + b; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator+(const Pack<kCount>& a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return a.v[i] + b.v[i]; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator-(Vec a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return a - b.v[i]; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator*(const Pack<kCount>& a, Vec b) {
  return Pack<kCount>::Each([&](int i) { return a.v[i] * b; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator*(const Pack<kCount>& a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return a.v[i] * b.v[i]; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> operator/(const Pack<kCount>& a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return a.v[i] / b.v[i]; });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Fma(const Pack<kCount>& a, Vec b,
                                               const Pack<kCount>& c) {
  return Pack<kCount>::Each([&](int i) { return Fma(a.v[i], b, c.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Fma(const Pack<kCount>& a, Vec b, Vec c) {
  return Pack<kCount>::Each([&](int i) { return Fma(a.v[i], b, c); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Fma(const Pack<kCount>& a, const Pack<kCount>& b,
                                               Vec c) {
  return Pack<kCount>::Each([&](int i) { return Fma(a.v[i], b.v[i], c); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Fma(const Pack<kCount>& a, const Pack<kCount>& b,
                                               const Pack<kCount>& c) {
  return Pack<kCount>::Each([&](int i) { return Fma(a.v[i], b.v[i], c.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Max(Vec a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return Max(a, b.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Max(const Pack<kCount>& a, const Pack<kCount>& b) {
  return Pack<kCount>::Each([&](int i) { return Max(a.v[i], b.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> NegativeAbs(const Pack<kCount>& a) {
  return Pack<kCount>::Each([&](int i) { return NegativeAbs(a.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> Round(const Pack<kCount>& a) {
  return Pack<kCount>::Each([&](int i) { return Round(a.v[i]); });
}
template <int kCount>
[[gnu::always_inline]] inline Pack<kCount> PowerOfTwo(const Pack<kCount>& a) {
  return Pack<kCount>::Each([&](int i) { return PowerOfTwo(a.v[i]); });
}

}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_SIMD_PACK_H_
