"""The shim that runs CUDA kernels on the host: that it computes right, and that it sees faults.

The kernels are those of ``cuda_on_host/test_kernels.cpp``.
"""

from __future__ import annotations

import ctypes
import math
import re

import kernels_on_host
import pytest
import torch
from cuda_on_host import build
from inputs import dtype_name
from torch import Tensor

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SOURCE = "test_kernels.cpp"
SEEDS = range(6)
NUMBERS = torch.arange(512, dtype=torch.float32) + 0.5


def run(
    kernel: str,
    threads: int = 64,
    *,
    grid: int = 1,
    cluster_size: int = 1,
    shared_bytes: int = 0,
    seed: int = 0,
    outputs: int = 0,
) -> Tensor:
    """What the kernel leaves in its ``outputs`` numbers, which are NaN before."""
    out = torch.full((max(outputs, 4 * grid * threads),), math.nan, dtype=torch.float64)
    build.call(
        SOURCE,
        "run_test_kernel",
        kernel.encode(),
        ctypes.c_int64(grid),
        cluster_size,
        threads,
        ctypes.c_int64(shared_bytes),
        ctypes.c_uint64(seed),
        ctypes.c_void_p(NUMBERS.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out[:outputs] if outputs else out


class TestRight:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_shuffles(self, seed: int) -> None:
        grid, threads = 3, 96
        out = run("shuffles", threads, grid=grid, seed=seed, outputs=grid * threads * 10)
        id = torch.arange(grid * threads, dtype=torch.float64)
        lane = id % 32
        first = id - lane
        up = torch.where(lane < 2, id, id - 2)
        down = torch.where(lane > 27, id, id + 4)
        xor = [(id.long() ^ bits).double() for bits in range(4)]
        wanted = [
            first + 5,
            1.5 * (first + (lane + 1) % 32),
            0.5 * xor[3],
            up,
            down - 2.0**40,
            down * 2.0**40,
            torch.full_like(id, 7.0),
            torch.where(lane < 16, xor[1], xor[2]),
            xor[2],
            (id.long() ^ 16).double(),
        ]
        assert torch.equal(out.view(-1, 10), torch.stack(wanted, 1))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_warp_reductions(self, seed: int) -> None:
        out = run("warp_reductions", seed=seed, outputs=64 * 12).view(2, 32, 12)
        assert torch.equal(out, out[:, :1].expand_as(out)), "every lane has the result"
        for warp in range(2):
            ids = range(32 * warp, 32 * warp + 32)
            values = [i * 37 % 101 - 50 for i in ids]
            bits = [i * 2654435761 % 2**32 for i in ids]
            all_bits, any_bit = 2**32 - 1, 0
            for b in bits:
                all_bits &= b | 0xFF00
                any_bit |= b & 0xFF00
            wanted = [sum(values), max(values), min(values)]
            wanted += [sum(bits) % 2**32, max(bits), min(bits), all_bits, any_bit]
            wanted += [sum((i % 3 == 0) << i % 32 for i in ids), 35 in ids, 35 not in ids, 32]
            assert out[warp, 0].tolist() == wanted

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("threads", [1, 2, 31, 32, 33, 100, 512, 1024])
    def test_block_sum(self, threads: int, seed: int) -> None:
        out = run("block_sum", threads, shared_bytes=4 * threads, seed=seed, outputs=threads)
        assert out.tolist() == [sum(i * i % 1000 for i in range(threads))] * threads

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("threads", [32, 192, 1024])
    def test_threads_that_have_returned_are_not_waited_for(self, threads: int, seed: int) -> None:
        out = run("block_sum_of_few", threads, shared_bytes=128, seed=seed, outputs=4)
        some = sum(i * i % 1000 for i in range(threads) if i % 32 >= 11)
        assert out.tolist() == [threads // 2, 1, 0, some]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_bits_and_atomics(self, seed: int) -> None:
        out = run("bits_and_atomics", shared_bytes=16, seed=seed, outputs=8 + 64)
        bits = 8 + 100 * 16 + 10000 * 4 + 100000 * 31 + 10000000 * 63 + 1000000000 * 32
        assert out[:8].tolist() == [64, 63, -63, 255, bits, 0x08000000, 2**32 - 1 + 8.5, 2.75]
        assert out[8:].sort().values.tolist() == list(range(64))
        assert (seed == 0) == (out[8:].tolist() == list(range(64)))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_every_block_runs_once(self, seed: int) -> None:
        out = run("vectors", 32, grid=4, seed=seed, outputs=256)
        assert torch.equal(out.view(torch.float32), NUMBERS)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("cluster_size", [1, 2, 4, 8])
    def test_cluster_sum(self, cluster_size: int, seed: int) -> None:
        grid = 3 * cluster_size
        out = run(
            "cluster_sum",
            8,
            grid=grid,
            cluster_size=cluster_size,
            shared_bytes=32,
            seed=seed,
            outputs=grid * 8,
        )
        blocks = torch.arange(grid, dtype=torch.float64).view(3, cluster_size, 1) * 100
        sums = (blocks + torch.arange(8)).sum(1, keepdim=True)
        assert torch.equal(out.view(3, cluster_size, 8), sums.expand(-1, cluster_size, -1))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_bulk_copies(self, seed: int) -> None:
        out = run("bulk_copies", 256, shared_bytes=1040, seed=seed, outputs=256)
        assert torch.equal(out, NUMBERS[:256].double())

    def test_a_seed_is_an_order(self) -> None:
        orders = [run("bits_and_atomics", shared_bytes=16, seed=s).tolist() for s in (1, 1, 2)]
        assert orders[0][8:72] == orders[1][8:72] != orders[2][8:72]


class TestRaces:
    """What a missing barrier does shows for some order, and with the barrier for none."""

    @pytest.mark.parametrize(
        ("kernel", "right"), [("neighbours", 1), ("warp_neighbours", 1), ("rounds", 0)]
    )
    def test_a_missing_barrier_is_seen(self, kernel: str, right: float) -> None:
        def wrong(kernel: str, seed: int) -> bool:
            out = run(kernel, 128, shared_bytes=512, seed=seed, outputs=128)
            return not (out == right).all()

        assert not any(wrong(kernel, seed) for seed in range(16))
        faulty = [wrong(f"{kernel} without barrier", seed) for seed in range(16)]
        assert sum(faulty[1:]) >= 4
        assert not faulty[0], "what only an unusual order shows"

    def test_a_missing_wait_is_poison(self) -> None:
        late = [run("bulk_copies without waiting", 256, shared_bytes=1040, seed=s) for s in SEEDS]
        assert late[0][:256].isnan().all()
        assert any(not out[:256].isnan().all() for out in late), "sometimes the bytes come early"

    def test_what_another_block_has_not_written_is_poison(self) -> None:
        out = run("early_read", 32, grid=2, cluster_size=2, shared_bytes=16, outputs=2)
        assert out.isnan().any()

    def test_memory_of_a_block_that_has_returned_is_poison(self) -> None:
        kernel = "returned_block by an earlier pointer"
        for seed in SEEDS:
            out = run(kernel, 32, grid=2, cluster_size=2, shared_bytes=16, seed=seed, outputs=1)
            assert out.isnan().all()

    def test_unwritten_memory_is_poison(self) -> None:
        assert run("unwritten", shared_bytes=256, outputs=64).isnan().all()

    def test_a_lane_that_has_returned_gives_poison(self) -> None:
        assert run("returned_lane", 32, outputs=32).isnan().all()


# A kernel's name, its launch, and what the shim says of it.
FAULTS = [
    (
        "barriers_of_two_branches",
        {},
        r"^barriers_of_two_branches: no thread can go on; block 0: threads 0 to 7 at __syncthreads "
        r"\(test_kernels\.cpp:\d+\), threads 8 to 63 at __syncthreads_or \(test_kernels\.cpp:\d+\)",
    ),
    ("barrier_of_a_branch", {}, r"threads 0 to 2 at __syncthreads .*, thread 3 at __syncthreads"),
    (
        "missing_lane",
        {"threads": 32},
        r"threads 0 to 30 at __shfl_xor_sync of the lanes ffffffff .*, thread 31 at __syncthreads ",
    ),
    ("different_masks", {"threads": 32}, r"thread 0 at __shfl_xor_sync of the lanes ffffffff "),
    ("different_operations", {}, r"thread 0 at __all_sync .*, thread 1 at __any_sync "),
    ("foreign_mask", {}, r"thread \d+, .*: __ballot_sync with the mask ffff0000, which does not"),
    ("narrow_shuffle", {}, r"__shfl_xor_sync with a width of 16"),
    (
        "overrun",
        {"shared_bytes": 256, "grid": 3},
        r"^overrun, block \d: it wrote outside of its 256 bytes of shared memory, at byte 256$",
    ),
    ("overrun", {"shared_bytes": 0}, r"outside of its 0 bytes of shared memory, at byte 256$"),
    ("underrun", {"shared_bytes": 256}, r"outside of its 256 bytes .*, at byte -256$"),
    (
        "misaligned_load",
        {},
        r"thread \d+, test_kernels\.cpp:\d+: load_once at 0x\w+8, which is",
    ),
    ("misaligned_store", {}, r"store_once at 0x\w+4, which is not a multiple of 16"),
    ("trap", {}, r"^trap, block 0, thread 2, test_kernels\.cpp:\d+: __trap"),
    ("wild_read", {}, r"block 0: thread 5 reads or writes at 0x\w+, where there is no memory"),
    ("large_frame", {}, r"block 0: thread \d+ needs more than the 65536 bytes of its stack"),
    ("foreign_pointer", {"shared_bytes": 16}, r"a pointer that is not into shared memory"),
    ("wait_without_arrival", {}, r"cluster_wait without cluster_arrive"),
    ("second_arrival", {}, r"cluster_arrive for the second time without cluster_wait"),
    ("half_of_a_cluster_barrier", {}, r"thread 1 returns between cluster_arrive and cluster_wait"),
    ("foreign_rank", {"cluster_size": 2, "shared_bytes": 16}, r"with rank 2 in a cluster of 2"),
    (
        "returned_block",
        {"cluster_size": 2, "shared_bytes": 16},
        r"of_cluster_rank with rank 1, whose block has returned",
    ),
    (
        "cluster_barrier_of_a_block",
        {"cluster_size": 2},
        r"block 0: threads 0 to 63 at cluster_wait .* \| block 1: thread 0 at __syncthreads .*, "
        r"threads 1 to 31 at __syncwarp of the lanes ffffffff .*, threads 32 to 63 at cluster_wait",
    ),
    ("copy: unawaited", {}, r"nobody waited for the bulk copy that was started at test_kernels"),
    ("copy: unstarted", {}, r"threads 0 to 63 at wait_for "),
    ("copy: unmade", {}, r"start_bulk_copy with an Arrival that was not made"),
    ("copy: without barrier", {}, r"wait_for with an Arrival that thread 0 made, and no barrier"),
    ("copy: used twice", {}, r"start_bulk_copy with an Arrival that was used before"),
    ("copy: made twice", {}, r"make_arrivals of an Arrival whose bulk copy nobody waited for"),
    ("copy: source", {}, r"start_bulk_copy from 0x\w+8, which is not a multiple of 16"),
    ("copy: target", {}, r"start_bulk_copy to 0x\w+4, which is not a multiple of 16"),
    ("copy: bytes", {}, r"start_bulk_copy of 40 bytes: not a multiple of 16"),
    ("copy: behind", {}, r"start_bulk_copy of 64 bytes to what is not all in the block's shared"),
    ("copy: outside", {}, r"make_arrivals of 1 that are not in the block's shared memory"),
    ("trap", {"threads": 1025}, r"the launch has 1025 threads"),
    ("trap", {"cluster_size": 9}, r"the launch has 9 blocks in a cluster, not 1 to 8"),
    ("trap", {"cluster_size": 2, "grid": 3}, r"the launch has 3 blocks, not a positive multiple"),
    ("trap", {"shared_bytes": 228 * 1024}, r"more than 227 KiB"),
]


@pytest.mark.parametrize(
    ("kernel", "launch", "message"), FAULTS, ids=[fault[0].replace(": ", "_") for fault in FAULTS]
)
def test_a_fault_ends_the_launch(kernel: str, launch: dict[str, int], message: str) -> None:
    if kernel.startswith("copy"):
        launch = {"shared_bytes": 272, **launch}
    launch = {"grid": launch.get("cluster_size", 1), **launch}
    with pytest.raises(RuntimeError) as first:
        run(kernel, **launch)
    assert re.search(message, str(first.value)), str(first.value)
    for seed in SEEDS:
        with pytest.raises(RuntimeError):
            run(kernel, seed=seed, **launch)
        assert run("block_sum", 3, shared_bytes=12, outputs=3).tolist() == [5] * 3, "goes on"


class TestTypesOf16Bits:
    """``__nv_bfloat16`` and ``__half`` against torch."""

    TYPES = (torch.bfloat16, torch.float16)

    @staticmethod
    def both(function: str, dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
        outputs = [torch.empty(inputs[0].shape, dtype=dtype) for _ in range(2)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *outputs)]
        build.call(SOURCE, function, *pointers, ctypes.c_int64(inputs[0].numel()))
        return outputs

    def test_all_of_them_as_floats(self) -> None:
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        for found, dtype in zip(self.both("widen", torch.float32, bits), self.TYPES, strict=True):
            wanted = bits.view(dtype).float()
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit(), wanted.signbit())

    @pytest.mark.parametrize("dtype", TYPES, ids=dtype_name)
    def test_floats_are_rounded(self, dtype: torch.dtype) -> None:
        """Any bits, and those of 16-bit numbers, half way between two, and next to half way."""
        any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
        exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
        half_way = exact.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))
        near = [half_way + step for step in (-1, 0, 1)]
        subnormal = (torch.arange(4096) * 2.0**-26).float()
        values = torch.cat(
            [*(t.view(torch.float32) for t in (any_bits, *near)), exact, subnormal, -subnormal]
        )
        found = self.both("convert", torch.int16, values)[self.TYPES.index(dtype)]
        wanted = values.to(dtype)
        is_nan = values.isnan()
        assert torch.equal(found[~is_nan], wanted.view(torch.int16)[~is_nan])
        assert (found[is_nan] == 0x7FFF).all()

    def test_the_larger_of_two(self) -> None:
        a = torch.randint(-(2**15), 2**15, (100_000,)).to(torch.int16)
        b = torch.cat([a[:100] ^ -(2**15), a[100:].flip(0)])
        a[:2], b[:2] = torch.tensor([0, -(2**15)]), torch.tensor([-(2**15), 0])
        found = self.both("larger", torch.int16, a, b)
        for bits, dtype in zip(found, self.TYPES, strict=True):
            x, y = (t.view(dtype).float() for t in (a, b))
            both_nan = x.isnan() & y.isnan()
            wanted = torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))
            assert torch.equal(bits.view(dtype).float()[~both_nan], wanted[~both_nan])
            assert (bits[both_nan] == 0x7FFF).all()
            assert (bits[:2] == 0).all(), "+0 is above -0"


class TestGuards:
    """What the harness does around a kernel."""

    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
    def test_poison(self, dtype: torch.dtype) -> None:
        tensor = kernels_on_host.Guarded((2, 3), dtype).tensor
        assert (tensor.isnan() if dtype.is_floating_point else tensor == -(2**63)).all()
        around = tensor.as_strided((4,), (1,), tensor.storage_offset() + 6)
        assert (around.isnan() if dtype.is_floating_point else around > 2**62).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
    def test_a_write_outside_is_seen(self, dtype: torch.dtype) -> None:
        for step in (-1, 3, 4, 8):
            output = kernels_on_host.Guarded((2, 3), dtype, strides=(5, 1), shift=1)
            assert output.tensor.data_ptr() % 64 == output.tensor.element_size()
            output.tensor.zero_()
            output.check("x")
            start = output.tensor.storage_offset()
            output.tensor.as_strided((1,), (1,), start + step).fill_(7)
            with pytest.raises(RuntimeError, match=f"x: written at element {step}, which is out"):
                output.check("x")

    def test_a_copy_lies_as_the_tensor(self) -> None:
        tensor = torch.randn(7, 3, 12)[1:, :, 1:6].transpose(0, 1)
        copy = kernels_on_host.Call("x").input("tensor", tensor)
        assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
        assert (copy.data_ptr() - tensor.data_ptr()) % 64 == 0

    def test_layouts(self) -> None:
        x = torch.empty(2, 3, 4, 5)
        layout = list(kernels_on_host._layout(x))
        assert layout == [1, 24, 0, 0, 0, 5, 0, 0, 0]
        layout = list(kernels_on_host._layout(x.transpose(0, 1)[:, :, :3]))
        assert layout == [3, 3, 2, 3, 0, 20, 60, 5, 0]
        with pytest.raises(ValueError, match="contiguous"):
            kernels_on_host._layout(x.transpose(2, 3))
