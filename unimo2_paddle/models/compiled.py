"""What the compiled CPU kernels are made of: numbers at addresses, MKL's matrix product, exp, the normal distribution and dropout.

numba keeps compiled code beside a module until that module changes: after a change here, touch the modules that use it.
"""
import ctypes
import os

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.extending import intrinsic

KEEP_SCALE = np.float32(2.0 ** -24)
SINGLE = np.float32

# not "nnan": a number that is not finite has to come out as one, or the loop would not notice a broken step
_LOOSE = {"contract", "reassoc", "nsz", "arcp", "afn"}


def compiled(**options):
    """Decorator of functions that run without the interpreter's lock, so that threads share a layer."""
    return njit(nogil=True, cache=True, error_model="numpy", **{"fastmath": _LOOSE, **options})


def _load_mkl():
    """Make MKL's single-precision product callable from compiled code under names of our own; returns its thread setting.

    Raises:
        OSError, AttributeError: this Paddle comes without MKL.
    """
    import paddle

    folder = os.path.join(os.path.dirname(paddle.__file__), "libs")
    library = ctypes.CDLL(os.path.join(folder, "libmklml_intel.so"))
    binding.add_symbol("unimo2_sgemm", ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value)
    threads = library.MKL_Set_Num_Threads_Local
    threads.argtypes, threads.restype = [ctypes.c_int], ctypes.c_int
    return threads


set_matmul_threads = _load_mkl()
_int, _address = types.int32, types.int64
_sgemm = types.ExternalFunction("unimo2_sgemm", types.void(
    _int, _int, _int, _int, _int, _int, types.float32, _address, _int, _address, _int, types.float32, _address, _int))


@intrinsic
def float_pointer(context, address):
    """An address as a pointer to float32."""
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())
    return types.CPointer(types.float32)(types.int64), code


@intrinsic
def _power_of_two(context, exponent):
    """2 ** exponent (int32, -126 to 127) as float32, made of its bits."""
    def code(context, builder, signature, arguments):
        integer = ir.IntType(32)
        bits = builder.shl(builder.add(arguments[0], ir.Constant(integer, 127)), ir.Constant(integer, 23))
        return builder.bitcast(bits, ir.FloatType())
    return types.float32(types.int32), code


@compiled()
def rows_at(address, rows, columns):
    return carray(float_pointer(address), (rows, columns))


@compiled()
def row_at(address, size):
    return carray(float_pointer(address), (size,))


@compiled()
def product_at(rows, columns, inner, scale, a, a_transposed, a_stride, b, b_transposed, b_stride, add, c, c_stride):
    """c = scale * a b (+ c when ``add`` is 1) of matrices at addresses; strides count numbers."""
    _sgemm(101, 112 if a_transposed else 111, 112 if b_transposed else 111, rows, columns, inner, scale, a, a_stride, b, b_stride, add, c, c_stride)


_EXP_LOW, _LOG2E = SINGLE(-87.0), SINGLE(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = SINGLE(0.693359375), SINGLE(-2.12194440e-4)  # their sum is ln 2, the first exact in few bits
_E2, _E3, _E4, _E5, _E6 = SINGLE(0.5), SINGLE(1 / 6), SINGLE(1 / 24), SINGLE(1 / 120), SINGLE(1 / 720)
HALF, ONE, ZERO = SINGLE(0.5), SINGLE(1.0), SINGLE(0.0)


@compiled(fastmath={"contract"})
def exponential(x):
    """exp of a number that is not above 88, within 2 units in the last place: 2 ** n times the series of the rest, |rest| <= ln(2) / 2."""
    x = _EXP_LOW if x < _EXP_LOW else x  # in this order: what is not a number stays so
    whole = np.floor(x * _LOG2E + HALF)
    rest = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = ONE + rest * (ONE + rest * (_E2 + rest * (_E3 + rest * (_E4 + rest * (_E5 + rest * _E6)))))
    return series * _power_of_two(np.int32(whole))


# x P(x^2) / Q(x^2) fitted to erf on [0, 3.95] (largest error of the fit 1.8e-8; beyond it erf is 1 in float32)
_P0, _P1, _P2, _P3, _P4, _P5 = (SINGLE(v) for v in (
    1.1283790069386253, 0.19402610066307416, 0.053205551460244964, 0.00391682560980653, 0.0002875760787941737, 2.0116501665706076e-06))
_Q1, _Q2, _Q3, _Q4, _Q5 = (SINGLE(v) for v in (
    0.5052826490916774, 0.11558656451414942, 0.01526974769244329, 0.001198055062457896, 3.78374446025924e-05))
_ERF_END, _INV_SQRT2, INV_SQRT_2PI = SINGLE(3.95), SINGLE(0.7071067811865476), SINGLE(0.3989422804014327)


@compiled()
def normal_cdf(x):
    """(1 + erf(x / sqrt 2)) / 2, the factor of the GELU; absolute error below 3e-7."""
    x = x * _INV_SQRT2
    x = _ERF_END if x > _ERF_END else x
    x = -_ERF_END if x < -_ERF_END else x
    z = x * x
    above = _P0 + z * (_P1 + z * (_P2 + z * (_P3 + z * (_P4 + z * _P5))))
    below = ONE + z * (_Q1 + z * (_Q2 + z * (_Q3 + z * (_Q4 + z * _Q5))))
    return HALF + HALF * x * above / below


# odd multipliers and shifts of an integer hash, each mixing high bits into low ones and back
_H0, _H1, _H2, _H3 = (np.uint32(v) for v in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x2C1B3C6D))
_S8, _S13, _S15, _S16 = (np.uint32(v) for v in (8, 13, 15, 16))


@compiled()
def kept_share(position, seed, keep):
    """1 / keep with probability ``keep``, else 0: a hash of (seed, position), so any part of a mask can be made again at any time."""
    # numba widens products of 32-bit numbers, so every step says how wide it is
    bits = np.uint32(np.uint32(np.uint32(position) * _H0) + np.uint32(seed))
    bits = np.uint32((bits ^ (bits >> _S16)) * _H1)
    bits = np.uint32((bits ^ (bits >> _S13) ^ np.uint32(seed >> 32)) * _H2)
    bits = np.uint32((bits ^ (bits >> _S15)) * _H3)
    bits = np.uint32(bits ^ (bits >> _S16)) >> _S8
    uniform = SINGLE(np.int32(bits)) * KEEP_SCALE
    return ONE / keep if uniform < keep else ZERO
