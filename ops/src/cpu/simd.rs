//! Vectors of float32, and the one place that picks instructions.
//!
//! A kernel is written once, generic over [`Simd`], and compiled once for each instruction set that is worth telling
//! apart. [`Isa::run`] calls it inside a function that the set is enabled for, so all that a kernel calls with vectors
//! must be `#[inline(always)]`.
#![allow(unsafe_code)]

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Isa(Set);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Set {
    Portable,
    /// The width of the widest set on any machine: so that its shapes are tested on all.
    #[cfg(test)]
    PortableWide,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Columns of the widest panel of any set.
pub(crate) const MAX_PANEL: usize = 32;
/// Lanes of the widest vector of any set.
pub(crate) const MAX_LANES: usize = 16;

impl Isa {
    /// The best that this machine has.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if avx512() {
                return Self(Set::Avx512);
            }
            if avx2() {
                return Self(Set::Avx2);
            }
        }
        Self(Set::Portable)
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "other machines have no more"))]
        let mut sets = vec![Set::Portable, Set::PortableWide];
        #[cfg(target_arch = "x86_64")]
        {
            sets.extend(avx2().then_some(Set::Avx2));
            sets.extend(avx512().then_some(Set::Avx512));
        }
        sets.into_iter().map(Self).collect()
    }

    /// Runs a kernel on these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            Set::Portable => kernel.run(Portable::<4>),
            #[cfg(test)]
            Set::PortableWide => kernel.run(Portable::<16>),
            // SAFETY: `best` and `all`, which alone make an `Isa`, have found the features on this machine.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::run_avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
}

/// Code for any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// The code; `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Out;
}

/// An instruction set that this machine has: a value of the type is the proof.
pub(crate) trait Simd: Copy {
    /// A vector of float32.
    type V: Copy;
    /// Its lanes.
    const LANES: usize;
    /// Rows of a tile: as many as keep its sums in registers, two vectors each.
    const ROWS: usize;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// The first entries of a slice that has at least as many as lanes.
    fn load(self, from: &[f32]) -> Self::V;
    /// To the first entries of such a slice.
    fn store(self, v: Self::V, to: &mut [f32]);
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the machine can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `x` where a > b, `y` elsewhere.
    fn where_greater(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// 2ⁿ, where the lowest bits of the lanes of `v` are the integer n, −126 to 127, above a multiple of 512.
    fn pow2(self, v: Self::V) -> Self::V;

    /// Writes 8 rows of one length as columns: `to[k · width + i]` is entry k of row i. Panics where `to` is too short.
    #[inline(always)]
    fn transpose(self, rows: &[&[f32]; 8], to: &mut [f32], width: usize) {
        transpose_from(0, rows, to, width);
    }

    /// Copies a row times a factor. Both have one length.
    #[inline(always)]
    fn scale(self, row: &[f32], factor: f32, to: &mut [f32]) {
        let splat = self.splat(factor);
        let (vectors, mut places) = (row.chunks_exact(Self::LANES), to.chunks_exact_mut(Self::LANES));
        let rest = vectors.remainder();
        for (vector, to) in vectors.zip(&mut places) {
            self.store(self.mul(self.load(vector), splat), to);
        }
        for (x, to) in rest.iter().zip(places.into_remainder()) {
            *to = x * factor;
        }
    }

    /// Adds a row times a factor to another. Both have one length.
    #[inline(always)]
    fn add_scaled(self, row: &[f32], factor: f32, to: &mut [f32]) {
        let splat = self.splat(factor);
        let (vectors, mut places) = (row.chunks_exact(Self::LANES), to.chunks_exact_mut(Self::LANES));
        let rest = vectors.remainder();
        for (vector, to) in vectors.zip(&mut places) {
            self.store(self.fma(self.load(vector), splat, self.load(to)), to);
        }
        for (x, to) in rest.iter().zip(places.into_remainder()) {
            *to += x * factor;
        }
    }

    /// Asks for a row to be brought into the first cache.
    #[inline(always)]
    fn prefetch<T>(self, row: &[T]) {
        let _ = row;
    }

    /// [`Self::load`] through a pointer.
    ///
    /// # Safety
    /// As many float32 as lanes must be readable there.
    unsafe fn load_at(self, from: *const f32) -> Self::V;

    /// Products of `R` rows with 2 or 1 vectors of columns: `Σ a[i·stride + k] · panel[k·width + j]` over k < `depth`,
    /// summed in order of k, so that equal operands give equal results wherever they are in a tile of whatever extent.
    ///
    /// Panics where an operand is too short.
    #[inline(always)]
    fn tile<const R: usize, const C: usize>(
        self,
        a: &[f32],
        stride: usize,
        panel: &[f32],
        width: usize,
        depth: usize,
    ) -> [[Self::V; C]; R] {
        let mut sums = [[self.splat(0.0); C]; R];
        let Some(last) = depth.checked_sub(1) else { return sums };
        assert!(R > 0 && C * Self::LANES <= width);
        assert!(a.len() > (R - 1) * stride + last && panel.len() >= last * width + C * Self::LANES);
        let rows: [_; R] = std::array::from_fn(|i| a[i * stride..].as_ptr());
        let mut panel = panel.as_ptr();
        for k in 0..depth {
            // SAFETY: k is at most `last`, so that entry k of each row, and C vectors of the panel from k · width on, are
            // within the slices, as asserted.
            unsafe {
                let columns: [_; C] = std::array::from_fn(|j| self.load_at(panel.add(j * Self::LANES)));
                for (&row, sums) in rows.iter().zip(&mut sums) {
                    let x = self.splat(*row.add(k));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = self.fma(x, column, *sum);
                    }
                }
            }
            panel = panel.wrapping_add(width);
        }
        sums
    }
}

/// [`Simd::transpose`] from entry `first` of the rows on.
#[inline(always)]
fn transpose_from(first: usize, rows: &[&[f32]; 8], to: &mut [f32], width: usize) {
    for k in first..rows[0].len() {
        for (row, to) in rows.iter().zip(&mut to[k * width..][..8]) {
            *to = row[k];
        }
    }
}

/// Any machine: arrays that the compiler makes vectors of as it can.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const N: usize>;

impl<const N: usize> Simd for Portable<N> {
    type V = [f32; N];
    const LANES: usize = N;
    const ROWS: usize = if N > 4 { 12 } else { 6 };

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::V {
        std::array::from_fn(|i| from[i])
    }
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32]) {
        to[..N].copy_from_slice(&v);
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Where there is no such instruction, `mul_add` calls a function.
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        std::array::from_fn(|i| if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn where_greater(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn pow2(self, v: Self::V) -> Self::V {
        std::array::from_fn(|i| f32::from_bits((v[i].to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }
    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's promise; an array needs no more alignment than its entries.
        unsafe { from.cast::<[f32; N]>().read() }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Simd};

    /// Runs a kernel on AVX2 and FMA.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
        kernel.run(Avx2(()))
    }

    /// Runs a kernel on AVX-512.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")]
    pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
        kernel.run(Avx512(()))
    }

    /// [`Simd::transpose`] in registers, eight columns at a time.
    #[inline]
    #[target_feature(enable = "avx")]
    fn transpose(rows: &[&[f32]; 8], to: &mut [f32], width: usize) {
        let len = rows[0].len();
        let whole = len - len % 8;
        assert!(rows.iter().all(|row| row.len() == len));
        assert!(whole == 0 || to.len() >= (whole - 1) * width + 8);
        for k in (0..whole).step_by(8) {
            // SAFETY: entries k to k + 8 are below `whole`, within every row; line k + 7, the last that is written, ends
            // within `to`, as asserted.
            unsafe {
                let load = |i: usize| _mm256_loadu_ps(rows[i].as_ptr().add(k));
                let to = to.as_mut_ptr().add(k * width);
                // Pairs of rows, then fours of them in each half, then eights.
                let fours = |i: usize| {
                    let (a, b, c, d) = (load(i), load(i + 1), load(i + 2), load(i + 3));
                    let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
                    let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
                    [
                        _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
                        _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
                        _mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
                        _mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
                    ]
                };
                let (upper, lower) = (fours(0), fours(4));
                for i in 0..4 {
                    _mm256_storeu_ps(to.add(i * width), _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]));
                    _mm256_storeu_ps(to.add((i + 4) * width), _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]));
                }
            }
        }
        super::transpose_from(whole, rows, to, width);
    }

    /// AVX2 and FMA; only [`run_avx2`] makes one.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    /// AVX-512; only [`run_avx512`] makes one.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    macro_rules! simd {
        ($set:ident, $vector:ident, lanes $lanes:literal, rows $rows:literal,
         $splat:ident $load:ident $store:ident $add:ident $sub:ident $mul:ident $div:ident
         $fma:ident $max:ident $min:ident,
         |$a:ident, $b:ident, $x:ident, $y:ident| $where_greater:expr, |$v:ident| $pow2:expr) => {
            // SAFETY, for all of it: the machine has the instructions, as there is a value of the type; slices are at
            // least as long as a vector, as asserted; and pointers are good, as promised.
            #[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
            impl Simd for $set {
                type V = $vector;
                const LANES: usize = $lanes;
                const ROWS: usize = $rows;

                #[inline(always)]
                fn splat(self, x: f32) -> Self::V {
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                fn load(self, from: &[f32]) -> Self::V {
                    assert!(from.len() >= Self::LANES);
                    unsafe { $load(from.as_ptr()) }
                }
                #[inline(always)]
                fn store(self, v: Self::V, to: &mut [f32]) {
                    assert!(to.len() >= Self::LANES);
                    unsafe { $store(to.as_mut_ptr(), v) }
                }
                #[inline(always)]
                fn add(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $sub(a, b) }
                }
                #[inline(always)]
                fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $mul(a, b) }
                }
                #[inline(always)]
                fn div(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $div(a, b) }
                }
                #[inline(always)]
                fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                    unsafe { $fma(a, b, c) }
                }
                #[inline(always)]
                fn max(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $max(a, b) }
                }
                #[inline(always)]
                fn min(self, a: Self::V, b: Self::V) -> Self::V {
                    unsafe { $min(a, b) }
                }
                #[inline(always)]
                fn where_greater(self, $a: Self::V, $b: Self::V, $x: Self::V, $y: Self::V) -> Self::V {
                    unsafe { $where_greater }
                }
                #[inline(always)]
                fn pow2(self, $v: Self::V) -> Self::V {
                    unsafe { $pow2 }
                }
                #[inline(always)]
                fn transpose(self, rows: &[&[f32]; 8], to: &mut [f32], width: usize) {
                    unsafe { transpose(rows, to, width) }
                }
                #[inline(always)]
                fn prefetch<T>(self, row: &[T]) {
                    for line in (0..size_of_val(row)).step_by(64) {
                        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(line)) }
                    }
                }
                #[inline(always)]
                unsafe fn load_at(self, from: *const f32) -> Self::V {
                    unsafe { $load(from) }
                }
            }
        };
    }

    // 16 registers: 12 sums, 2 columns, a factor.
    simd!(
        Avx2, __m256, lanes 8, rows 6,
        _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps
        _mm256_fmadd_ps _mm256_max_ps _mm256_min_ps,
        |a, b, x, y| _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)),
        |v| _mm256_castsi256_ps(_mm256_add_epi32(
            _mm256_slli_epi32::<23>(_mm256_castps_si256(v)),
            _mm256_castps_si256(_mm256_set1_ps(1.0)),
        ))
    );

    // 32 registers: 24 sums, 2 columns, a factor; the others are of use to the compiler.
    simd!(
        Avx512, __m512, lanes 16, rows 12,
        _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps
        _mm512_fmadd_ps _mm512_max_ps _mm512_min_ps,
        |a, b, x, y| _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x),
        |v| _mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_slli_epi32::<23>(_mm512_castps_si512(v)),
            _mm512_castps_si512(_mm512_set1_ps(1.0)),
        ))
    );
}

/// 2ˣ in every lane, to 2e-7 of it (3e-7 where nothing is fused); −125 and below give 2⁻¹²⁵, NaN gives NaN. Above 127 it means nothing.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    // Adding this leaves the integer in the lowest bits, rounded to nearest.
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    let x = s.max(s.splat(-125.0), x);
    let shifted = s.add(x, s.splat(SHIFT));
    let f = s.sub(x, s.sub(shifted, s.splat(SHIFT)));
    // The polynomial of least relative error on [−½, ½] with constant 1, its terms in pairs that need not wait for one
    // another.
    #[expect(clippy::approx_constant, reason = "a term of this polynomial, not of the series")]
    const LINEAR: f32 = 0.693_147;
    let pair = |first, second| s.fma(f, s.splat(second), s.splat(first));
    let squared = s.mul(f, f);
    let high = s.fma(squared, pair(0.009_671_513, 0.001_326_472_7), pair(0.240_222_42, 0.055_507_336));
    let power = s.fma(squared, high, pair(1.0, LINEAR));
    s.mul(power, s.pow2(shifted))
}

/// Reduces lanes, pairwise.
#[inline(always)]
pub(crate) fn fold(lanes: &[f32], pair: impl Fn(f32, f32) -> f32) -> f32 {
    let mut all = [0.0; MAX_LANES];
    all[..lanes.len()].copy_from_slice(lanes);
    let mut half = lanes.len() / 2;
    while half > 0 {
        for i in 0..half {
            all[i] = pair(all[i], all[i + half]);
        }
        half /= 2;
    }
    all[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exponentials(Vec<f32>);

    impl Kernel for Exponentials {
        type Out = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(mut self, simd: S) -> Vec<f32> {
            for x in self.0.chunks_exact_mut(S::LANES) {
                simd.store(exp2(simd, simd.load(x)), x);
            }
            self.0
        }
    }

    #[test]
    fn exponentials_are_exact_enough_everywhere() {
        let inputs: Vec<f32> = (0..1 << 20).map(|i| -(i as f32) * (140.0 / (1 << 20) as f32)).collect();
        for isa in Isa::all() {
            for (x, y) in inputs.iter().zip(isa.run(Exponentials(inputs.clone()))) {
                let exact = f64::from(*x).max(-125.0).exp2();
                assert!((f64::from(y) / exact - 1.0).abs() < 3e-7, "{isa:?}: {x} gives {y}");
            }
            let special = [f32::NAN, f32::NEG_INFINITY, 0.0, -0.0].repeat(4);
            let [nan, least, one, also_one] = isa.run(Exponentials(special))[..4] else { unreachable!() };
            assert!(nan.is_nan());
            assert_eq!((least, one, also_one), (2f32.powi(-125), 1.0, 1.0), "{isa:?}");
        }
    }

    struct Transposed<'a>(&'a [f32], usize);

    impl Kernel for Transposed<'_> {
        type Out = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self(rows, width) = self;
            let len = rows.len() / 8;
            let mut to = vec![-1.0; len * width];
            simd.transpose(&std::array::from_fn(|i| &rows[i * len..][..len]), &mut to, width);
            to
        }
    }

    #[test]
    fn rows_become_columns() {
        for (isa, len, width) in Isa::all().into_iter().flat_map(|isa| [(isa, 5, 8), (isa, 16, 9), (isa, 21, 32)]) {
            let rows: Vec<_> = (0..8 * len).map(|x| x as f32).collect();
            let columns = isa.run(Transposed(&rows, width));
            for (i, x) in columns.into_iter().enumerate() {
                let (k, row) = (i / width, i % width);
                assert_eq!(x, if row < 8 { (row * len + k) as f32 } else { -1.0 }, "{isa:?}");
            }
        }
    }
}
