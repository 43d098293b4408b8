"""The emulation refuses what the documents forbid: each kernel of rules.h breaks one rule, or just
keeps it."""

import re

import pytest

from emulator import A5_NAME

BROKEN = {
    "alignment of an operand": "alignment: Duplicate at 1028 of the unified buffer, not a multiple of 32",
    "alignment of a transfer's length": "alignment: DataCopy of 28 bytes, not a multiple of 32",
    "alignment of a transfer's address": "alignment: DataCopy to the unified buffer at 16 of the unified buffer",
    "budget of the unified buffer": "budget: 188192 bytes of unified buffer; Ascend910B1 has 188160",
    "uninitialised read": "uninitialised: Abs reads unified buffer at 1280, which nothing wrote",
    "uninitialised read of a buffer that was used before": "uninitialised: DataCopy to global memory reads",
    "uninitialised tail of a padded transfer": "uninitialised: Abs reads unified buffer at 0",
    "queue: use between EnQue and DeQue": "queue: Abs uses a tensor that is in the queue",
    "queue: use after FreeTensor": "queue: Abs uses a tensor that was freed",
    "queue: not freed": "queue: a tensor is not freed at the end of the kernel",
    "queue: no buffer left": "queue: AllocTensor, but none of the 2 buffers was freed",
    "queue: full": "queue: EnQue into a full queue of depth 1",
    "queue: DeQue from an empty queue": "queue: DeQue from an empty queue",
    "queue: more buffers than events": "queue: 9 buffers at one position; there are 8 events",
    "repeat of 256": "range: repeatTime 256; it is 1 to 255",
    "repeat of 0": "range: repeatTime 0; it is 1 to 255",
    "mask of 65": "range: mask 65; it is 1 to 64",
    "blocks of a transfer": "range: .* blockCount 4096; it is 1 to 4095",
    "overlap of a repeat with the next": "overlap: Add reads at 1280 what an earlier repeat .* wrote",
    "overlap within a repeat": "overlap: Add writes at 1056 part of what the same repeat reads",
    "bounds of a buffer": "bounds: Duplicate goes 4 bytes past the end of its buffer",
    "bounds of global memory": "bounds: .* 256 bytes of global memory outside every tensor",
    "a write to an input": "bounds: DataCopy to global memory writes input, an input",
    "two cores write one address": "conflict: core 0 writes global memory that core 1 writes in the same launch",
    "a core reads what another writes": "conflict: core [01] (reads .* writes|writes .* reads)",
    "scalar stores in one cache line": "cache line: cores [01] and [01] store scalars in one line of 64 bytes",
    "order: MTE2 to V without a queue": "order: Abs on V at 5120 is a read of a write by MTE2",
    "order: V to MTE3 without a queue": "order: DataCopy to global memory on MTE3 at 5120 is a read of a write by V",
    "order: MTE2 refills what V still reads": "order: .* on MTE2 at 5120 is a write over a read by V",
    "order: MTE2 refills what MTE3 still reads": "order: .* on MTE2 at 5120 is a write over a read by MTE3",
    "order: S reads what MTE2 loads": "order: GetValue on S at 5132 is a read of a write by MTE2",
    "order: two loads into one place": "order: .* on MTE2 at 0 is a write over a write by MTE2",
    "order: two stores to one address": r"order: two transfers of one core meet in global memory \(MTE3, then MTE3\)",
    "order: addresses without a barrier before": "order: TransDataTo5HD on V at 1024 is a read of a write by V",
    "order: addresses without a barrier behind": "order: Adds on V at 1536 follows an instruction .* addresses",
    "event: set twice": "event: V_S 1 is set twice without a wait",
    "event: wait without a set": "event: S waits for V 1, which is not set",
    "event: set and never waited for": "event: a flag is left set at the end of the kernel",
    "position of a transfer": "position: DataCopyPad to the unified buffer and a buffer at VECCALC",
    "fp8 on A2": "product: Ascend910B1 has no Cast to fp8_e4m3fn_t",
}
KEPT = (
    "keeps every rule",
    "budget of the unified buffer, the last byte",
    "scalar stores in two cache lines",
    "order: MTE2 to V by a flag",
    "order: two loads into one place with a barrier",
    "order: addresses between barriers",
)
READ_AGAIN = (
    "a value that changes after it was read, without an invalidation",
    "a value that changes after it was read, with an invalidation",
)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_kernel_that_breaks_the_rule_is_refused(ascend_emulation, rule):
    ascend_emulation.use()
    message = ascend_emulation.broken_rule(rule)
    assert re.match(BROKEN[rule], message), message


@pytest.mark.parametrize("rule", KEPT)
def test_a_kernel_that_just_keeps_the_rule_is_not(ascend_emulation, rule):
    ascend_emulation.use()
    assert ascend_emulation.broken_rule(rule) == ""


@pytest.mark.parametrize("rule", READ_AGAIN)
def test_the_scalar_unit_sees_a_change_only_after_an_invalidation(ascend_emulation, rule):
    ascend_emulation.use()
    assert ascend_emulation.broken_rule(rule, cores=1) == ""


def test_the_950_has_more_room_and_casts_to_fp8(ascend_emulation):
    ascend_emulation.use(product=A5_NAME)
    assert ascend_emulation.broken_rule("budget of the unified buffer") == ""
    assert ascend_emulation.broken_rule("fp8 on A2") == ""


def test_bytes_transfers_vector_repeats_and_scalars_are_counted(ascend_emulation):
    ascend_emulation.use()
    ascend_emulation.broken_rule("keeps every rule", cores=3)
    ascend_emulation.broken_rule("scalar stores in two cache lines", cores=1)
    counted, scalar = ascend_emulation.counts()
    assert len(counted) == 3
    for core in counted:
        assert (core["read_bytes"], core["reads"], core["write_bytes"], core["writes"]) == (
            5 * 256,
            5,
            5 * 256,
            5,
        )
        assert core["vector"] == {"Adds/float": [5, 5, 0, 5]}
    assert scalar[0]["scalar_global"] == 1
