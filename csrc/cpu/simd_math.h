// Activations and their derivatives on vectors, within 4 units in the last place of the result from underflow to
// overflow. Lanes are independent and every lane does the same operations, so a value's bits do not depend on its
// place in a vector.
//
// Everything rests on one exponential of a number that is not positive, kept in parts, so that no digit is lost to
// overflow or to a subnormal intermediate: only the last multiplication of a tail may round into the subnormals.
// The normal distribution function of a negative number is that exponential times its Mills ratio, which varies
// slowly and is a quotient of polynomials with positive coefficients, evaluated without cancellation.
//
// A single lane (the scalar ISA) takes the functions of simd.h: float in double precision, double by libm alone,
// whose normal distribution function loses x * x / 2 units in the last place in its negative tail.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

#if defined(__AVX512F__) || defined(__AVX2__)

// ---- operations ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

inline Vec<float> div(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec<double> div(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
// The second operand is what the instruction returns for NaN.
inline Vec<float> at_most(float limit, Vec<float> x) { return {_mm512_min_ps(_mm512_set1_ps(limit), x.v)}; }
inline Vec<double> at_most(double limit, Vec<double> x) { return {_mm512_min_pd(_mm512_set1_pd(limit), x.v)}; }
inline Vec<float> magnitude(Vec<float> x) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v)}; }
inline Vec<double> magnitude(Vec<double> x) { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), x.v)}; }
// x >= 0 with the sign of y.
inline Vec<float> with_sign_of(Vec<float> x, Vec<float> y) {
  return {_mm512_or_ps(x.v, _mm512_and_ps(y.v, _mm512_set1_ps(-0.0f)))};
}
inline Vec<double> with_sign_of(Vec<double> x, Vec<double> y) {
  return {_mm512_or_pd(x.v, _mm512_and_pd(y.v, _mm512_set1_pd(-0.0)))};
}
// The lowest bits of x as sign and exponent.
inline Vec<float> low_bits_as_exponent(Vec<float> x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
}
inline Vec<double> low_bits_as_exponent(Vec<double> x) {
  return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x.v), 52))};
}

#else

inline Vec<float> div(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec<double> div(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Vec<float> at_most(float limit, Vec<float> x) { return {_mm256_min_ps(_mm256_set1_ps(limit), x.v)}; }
inline Vec<double> at_most(double limit, Vec<double> x) { return {_mm256_min_pd(_mm256_set1_pd(limit), x.v)}; }
inline Vec<float> magnitude(Vec<float> x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline Vec<double> magnitude(Vec<double> x) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v)}; }
inline Vec<float> with_sign_of(Vec<float> x, Vec<float> y) {
  return {_mm256_or_ps(x.v, _mm256_and_ps(y.v, _mm256_set1_ps(-0.0f)))};
}
inline Vec<double> with_sign_of(Vec<double> x, Vec<double> y) {
  return {_mm256_or_pd(x.v, _mm256_and_pd(y.v, _mm256_set1_pd(-0.0)))};
}
inline Vec<float> low_bits_as_exponent(Vec<float> x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
}
inline Vec<double> low_bits_as_exponent(Vec<double> x) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x.v), 52))};
}

#endif

// ---- constants -------------------------------------------------------------------------------------------------

// exponential: the polynomial q with exp(r) = 1 + r + r * r * q(r) for |r| <= log(2) / 2, interpolated at Chebyshev's
//     points; highest power first.
// mills_numerator / mills_denominator: Phi(-t) * exp(t * t / 2), Phi being the normal distribution function, minimax in
//     the relative error (Remez) up to where x * Phi(x) underflows; lowest power first.
// Rounded to their type, exp(r) is within 0.1 units in the last place, the quotient within 0.3.
template <class A>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr float exponential[] = {0.0013926204f, 0.008363195f, 0.041666556f, 0.16666576f, 0.5f};
  static constexpr float mills_numerator[] = {0.5f, 0.43849692f, 0.18338497f, 0.040683795f, 0.0041238316f};
  static constexpr float mills_denominator[] = {1.0f,        1.6748788f,  1.203125f,
                                                0.46986622f, 0.10198553f, 0.010336795f};
  static constexpr float log2_of_e = 1.4426950f, log_of_2 = 0.69314718f, log_of_2_rest = -1.9046542e-9f;
  static constexpr float exponent_bias = 127, rounder = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_underflow = 176.3f, normal_underflow = 18.76f, tanh_saturation = 10;
};

template <>
struct MathConstants<double> {
  static constexpr double exponential[] = {
      2.51004110820149e-08,   2.7620121717381933e-07, 2.7557268406190795e-06, 2.4801521225986432e-05,
      0.00019841269863088255, 0.0013888888917258759,  0.008333333333330055,   0.04166666666662404,
      0.16666666666666669,    0.5000000000000001};
  static constexpr double mills_numerator[] = {
      0.5,                   0.8277377171299781,    0.6793183570636017,    0.35712147434063674,
      0.13193705352260066,   0.035630817471853614,  0.007113887056417883,  0.0010381482069521687,
      0.00010638295859770736, 6.961378650043343e-06, 2.2363175265443963e-07};
  static constexpr double mills_denominator[] = {
      1.0,                   2.4533599950628218,    2.816134776279215,      2.0004749305508143,
      0.9794541343150808,    0.34802129250531966,   0.09188056729145086,    0.018097411837572297,
      0.0026197012375667925, 0.0002672230936309813, 1.7449588554641887e-05, 5.605616743087722e-07};
  static constexpr double log2_of_e = 1.4426950408889634, log_of_2 = 0.6931471805599453,
                          log_of_2_rest = 2.3190468138462996e-17;
  static constexpr double exponent_bias = 1023, rounder = 6755399441055744;  // 1.5 * 2^52
  static constexpr double exp_underflow = 1418.4, normal_underflow = 53.256, tanh_saturation = 20;
};
// The exponents of exp(-exp_underflow) and exp(-normal_underflow^2 / 2) round to -2 * exponent_bias, which scaled()
// takes for 0. exp(-exp_underflow) lies below that power of 2, so that its mantissa times a finite number is finite.

template <class A>
inline Vec<A> one() {
  return broadcast(A(1));
}
template <class A>
inline Vec<A> negated(Vec<A> x) {
  return sub(zero<A>(), x);
}
template <class A>
inline Mask<A> is_negative(Vec<A> x) {
  return greater(zero<A>(), x);
}

// ---- the exponential in parts ----------------------------------------------------------------------------------

template <class A, int size>
inline Vec<A> horner(const A (&coefficients)[size], Vec<A> x) {
  Vec<A> value = broadcast(coefficients[0]);
  for (int i = 1; i < size; ++i) value = fma(value, x, broadcast(coefficients[i]));
  return value;
}

// (1 + excess) * 2^exponent, the exponent an integer in [-2 * exponent_bias, 0].
template <class A>
struct Exponential {
  Vec<A> excess, exponent;
};

// exp(x + correction) for -exp_underflow <= x <= 0 and a correction of the size of x's rounding error.
template <class A>
inline Exponential<A> exponential(Vec<A> x, Vec<A> correction) {
  using C = MathConstants<A>;
  const Vec<A> exponent = sub(fma(x, broadcast(C::log2_of_e), broadcast(C::rounder)), broadcast(C::rounder));
  Vec<A> r = fma(exponent, broadcast(-C::log_of_2), x);
  r = add(fma(exponent, broadcast(-C::log_of_2_rest), r), correction);
  return {fma(mul(r, r), horner(C::exponential, r), r), exponent};
}

// x * 2^exponent for an exponent in [-2 * exponent_bias, 0], rounded once: in two steps, as no float is 2^-149. The
// lowest exponent gives x * 0.
template <class A>
inline Vec<A> scaled(Vec<A> x, Vec<A> exponent) {
  using C = MathConstants<A>;
  // The sum's lowest bits are the exponent's half with its bias.
  const Vec<A> biased_rounder = broadcast(C::rounder + C::exponent_bias);
  const Vec<A> half = fma(exponent, broadcast(A(0.5)), biased_rounder);
  const Vec<A> other_half = add(sub(exponent, sub(half, biased_rounder)), biased_rounder);
  return mul(mul(x, low_bits_as_exponent(half)), low_bits_as_exponent(other_half));
}

// exp(x) for x that is not positive.
template <class A>
inline Vec<A> exp_of_not_positive(Vec<A> x) {
  const Vec<A> t = at_most(MathConstants<A>::exp_underflow, magnitude(x));
  const Exponential<A> e = exponential(negated(t), zero<A>());
  return scaled(add(one<A>(), e.excess), e.exponent);
}

// ---- the activations -------------------------------------------------------------------------------------------

// sigmoid(x) * factor. For x < 0 the factor is multiplied before the scaling: the product may be a normal number
// where the sigmoid is none. -inf * 0 is NaN, as it is in x * sigmoid(x).
template <class A>
inline Vec<A> sigmoid_times(Vec<A> x, Vec<A> factor) {
  const Vec<A> t = at_most(MathConstants<A>::exp_underflow, magnitude(x));
  const Exponential<A> e = exponential(negated(t), zero<A>());
  const Vec<A> mantissa = add(one<A>(), e.excess);
  const Vec<A> quotient = div(factor, add(one<A>(), scaled(mantissa, e.exponent)));
  return select(is_negative(x), scaled(mul(quotient, mantissa), e.exponent), quotient);
}

// s * (1 + x * (1 - s)) for the sigmoid s, with 1 - s computed as the sigmoid of -x.
template <class A>
inline Vec<A> silu_derivative(Vec<A> x) {
  const Vec<A> t = at_most(MathConstants<A>::exp_underflow, magnitude(x));
  const Exponential<A> e = exponential(negated(t), zero<A>());
  const Vec<A> mantissa = add(one<A>(), e.excess), exp = scaled(mantissa, e.exponent);
  const Vec<A> quotient = div(one<A>(), add(one<A>(), exp));
  // sigmoid(t) from its complement, which is the smaller of the two.
  const Vec<A> larger = fma(negated(exp), quotient, one<A>());
  const Vec<A> of_negative = scaled(mul(mul(larger, mantissa), fma(negated(t), larger, one<A>())), e.exponent);
  const Vec<A> of_positive = mul(larger, fma(t, mul(exp, quotient), one<A>()));
  return select(is_negative(x), of_negative, of_positive);
}

// For t = |x| and e = exp(-2t): (1 - e) / (1 + e) with expm1 for 1 - e, which cancels nowhere, up to about 1/2; beyond,
// 1 - 2e / (1 + e), which near 1 is rounded once: the derivative is taken from the output's distance to 1.
template <class A>
inline Vec<A> tanh(Vec<A> x) {
  using C = MathConstants<A>;
  const Vec<A> t = at_most(C::tanh_saturation, magnitude(x));
  const Exponential<A> e = exponential(mul(t, broadcast(A(-2))), zero<A>());
  const Vec<A> power = scaled(one<A>(), e.exponent), exp = fma(power, e.excess, power);
  const Vec<A> minus_expm1 = fma(negated(power), e.excess, sub(one<A>(), power));
  const Mask<A> large = greater(t, broadcast(A(0.55)));
  const Vec<A> quotient = div(select(large, add(exp, exp), minus_expm1), add(one<A>(), exp));
  return with_sign_of(select(large, sub(one<A>(), quotient), quotient), x);
}

// ---- gelu ------------------------------------------------------------------------------------------------------

// A sum and its rounding error.
template <class A>
struct Sum {
  Vec<A> value, rest;
};

// Every other coefficient from `first` on, over x^first, by halves (Estrin's scheme): numerator and denominator of a
// quotient share the powers of x^2 and their errors. square: x^2, x^4, x^8.
template <int first, int count, class A, int size>
inline Vec<A> every_other_term(const A (&coefficients)[size], const Vec<A> (&square)[3]) {
  if constexpr (count == 1) {
    return broadcast(coefficients[first]);
  } else {
    constexpr int log_half = count > 4 ? 2 : count > 2 ? 1 : 0, half = 1 << log_half;
    return fma(every_other_term<first + 2 * half, count - half>(coefficients, square), square[log_half],
               every_other_term<first, half>(coefficients, square));
  }
}

// The polynomial at x >= 0, for coefficients >= 0. Even and odd terms apart, and the first of each apart from the rest:
// for a small x one rounding counts, for a large one few do.
template <class A, int size>
inline Sum<A> polynomial(const A (&coefficients)[size], Vec<A> x, const Vec<A> (&square)[3]) {
  const Vec<A> even =
      fma(every_other_term<2, (size - 1) / 2>(coefficients, square), square[0], broadcast(coefficients[0]));
  const Vec<A> odd =
      fma(every_other_term<3, (size - 2) / 2>(coefficients, square), square[0], broadcast(coefficients[1]));
  const Vec<A> value = fma(odd, x, even);
  return {value, fma(odd, x, sub(even, value))};
}

// exp(-t * t / 2) and the Mills ratio Phi(-t) / exp(-t * t / 2) for t = |x|.
template <class A>
struct NormalTail {
  Vec<A> t;
  Exponential<A> exp;
  Sum<A> numerator, denominator;

  explicit NormalTail(Vec<A> x) : t(at_most(MathConstants<A>::normal_underflow, magnitude(x))) {
    const Vec<A> t2 = mul(t, t), t4 = mul(t2, t2), minus_half = broadcast(A(-0.5));
    // Half a unit in the last place of t * t would be many of its exponential.
    const Vec<A> rest = fma(t, t, negated(t2));
    exp = exponential(mul(t2, minus_half), mul(rest, minus_half));
    const Vec<A> square[] = {t2, t4, mul(t4, t4)};
    numerator = polynomial(MathConstants<A>::mills_numerator, t, square);
    denominator = polynomial(MathConstants<A>::mills_denominator, t, square);
  }

  // The Mills ratio times a factor >= 0.
  Sum<A> mills_ratio_times(Vec<A> factor) const {
    const Vec<A> reciprocal = div(one<A>(), denominator.value);
    const Vec<A> product = mul(factor, numerator.value), product_rest = fma(factor, numerator.value, negated(product));
    const Vec<A> quotient = mul(product, reciprocal);
    Vec<A> remainder = add(fma(negated(quotient), denominator.value, product), product_rest);
    remainder = fma(factor, numerator.rest, remainder);
    remainder = fma(negated(quotient), denominator.rest, remainder);
    return {quotient, mul(remainder, reciprocal)};
  }

  // (value + rest) * exp(-t * t / 2)
  Vec<A> times_exp(Vec<A> value, Vec<A> rest) const {
    return scaled(add(value, fma(value, exp.excess, rest)), exp.exponent);
  }
};

template <class A>
inline Vec<A> gelu(Vec<A> x) {
  const NormalTail<A> tail(x);
  const Sum<A> product = tail.mills_ratio_times(tail.t);
  // x * Phi(x) = max(x, 0) - t * Phi(-t); of -inf it is NaN, -inf * 0.
  const Vec<A> positive_part = select(is_negative(x), mul(x, zero<A>()), x);
  return sub(positive_part, tail.times_exp(product.value, product.rest));
}

// Phi(x) + x * phi(x), where phi(x) = exp(-x * x / 2) / sqrt(2 pi) is the density. Its values at x and -x add to 1.
template <class A>
inline Vec<A> gelu_derivative(Vec<A> x) {
  const NormalTail<A> tail(x);
  const Sum<A> ratio = tail.mills_ratio_times(one<A>());
  const Vec<A> of_negative =
      tail.times_exp(fma(tail.t, broadcast(A(-0.39894228040143267794)), ratio.value), ratio.rest);
  return select(is_negative(x), of_negative, sub(one<A>(), of_negative));
}

// ---- by name ---------------------------------------------------------------------------------------------------

// As activate() of simd.h. Inlined, so that a constant activation leaves its own code alone.
template <class A>
__attribute__((always_inline)) inline Vec<A> activate(Activation activation, Vec<A> x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return select(is_negative(x), zero<A>(), x);
    case Activation::sigmoid:
      return sigmoid_times(x, one<A>());
    case Activation::tanh:
      return tanh(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::silu:
      return sigmoid_times(x, x);
  }
  return x;
}

// As activation_derivative() of simd.h.
template <class A>
__attribute__((always_inline)) inline Vec<A> activation_derivative(Activation activation, Vec<A> saved) {
  switch (activation) {
    case Activation::relu:
      return select(either(greater(saved, zero<A>()), is_nan(saved)), one<A>(), zero<A>());
    case Activation::sigmoid:
      return mul(saved, sub(one<A>(), saved));
    case Activation::tanh:
      return sub(one<A>(), mul(saved, saved));
    case Activation::gelu:
      return gelu_derivative(saved);
    case Activation::silu:
      return silu_derivative(saved);
    case Activation::none:
      break;
  }
  return one<A>();
}

#else

template <class A>
inline Vec<A> exp_of_not_positive(Vec<A> x) {
  return {exp_of(x.v)};
}
inline Vec<double> activate(Activation activation, Vec<double> x) { return {activate(activation, x.v)}; }
inline Vec<double> activation_derivative(Activation activation, Vec<double> saved) {
  return {activation_derivative(activation, saved.v)};
}
inline Vec<float> activate(Activation activation, Vec<float> x) {
  return {static_cast<float>(activate(activation, static_cast<double>(x.v)))};
}
inline Vec<float> activation_derivative(Activation activation, Vec<float> saved) {
  return {static_cast<float>(activation_derivative(activation, static_cast<double>(saved.v)))};
}

#endif

}  // namespace
}  // namespace pyconv::cpu
