// Compiled once per instruction set with COMMOPT_ISA = base, avx2 or avx512; exports that one table and nothing else.
// Everything here is internal and no standard library is included: a symbol that the linker shares between the objects
// could carry an instruction that the machine lacks.
#include "table.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own AVX-512 header

#include "dense.h"
#include "half.h"
#include "floats.h"
#include "quant.h"
#include "quant_shared.h"
#include "ternary.h"
#include "sign.h"
#include "hadamard.h"
#include "topk.h"
#include "threshold.h"
#include "blocktopk.h"
#include "randomk.h"

namespace commopt::cpu {

#define COMMOPT_JOIN2(a, b) a##b
#define COMMOPT_JOIN(a, b) COMMOPT_JOIN2(a, b)
#define COMMOPT_TEXT2(a) #a
#define COMMOPT_TEXT(a) COMMOPT_TEXT2(a)

const Table COMMOPT_JOIN(table_, COMMOPT_ISA) = {
    COMMOPT_TEXT(COMMOPT_ISA), dense_encode, dense_decode_sum, half_encode, half_decode_sum,
    absmax, float_encode, float_decode_sum,
    quant_encode, quant_decode_sum, quant_resum, quant_absmax, quant_encode_shared, quant_decode_shared,
    ternary_encode, ternary_decode_sum, sign_encode, sign_decode_sum, sign_vote,
    hadamard_encode, hadamard_keep, hadamard_decode,
    topk_scan, topk_keys, topk_emit, threshold_scan, topk_decode_sum,
    blocktopk_encode, blocktopk_decode_sum, randomk_encode, randomk_decode_sum,
    axpy,
};

}  // namespace commopt::cpu
