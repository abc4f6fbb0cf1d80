"""The AMX path of the native library: its own machine code, run by real tiles or by `amx_traps.c`, against float64,
the AVX-512 path and itself; and the inner loops that the compiler makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kvbaton.engine.greedy import generate
from kvbaton.engine.model.loader import load_model
from kvbaton.engine.model.native_decoder import NativeDecoder, native_decoder
from kvbaton.engine.tiny import probe_prompts
from kvbaton.kernels.cpu import CpuKernels, NativeAttention
from kvbaton.kernels.meta import build_attention_meta
from kvbaton.kernels.native_build import SOURCES
from kvbaton.kernels.native_lib import native_library
from support.decoder_cases import CONFIGS, CPU, assert_alone_as_in_company, make_step, plain, widened
from support.kernel_cases import Shape, expected_attention, expected_rope, make_case
from support.native_products import PANEL, Int8Products, Products, build, compiler_with
from support.oracle import TinyModels

pytestmark = pytest.mark.process

ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 40, 64, 65, 97)
# odd and even, around one and two instructions, around the passes of 512 and 4096 inputs and of 224 rows
INPUTS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 127, 200)
DEEP = ((1, 4200), (33, 4200), (65, 513), (97, 512), (97, 1055), (230, 1200), (450, 600), (70, 4129))
SEQUENCES = ((1, 1), (1, 40), (1, 530), (40, 40), (30, 600), (18, 45))


@pytest.fixture(scope="module", name="library_path")
def _library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("amx"))


@pytest.fixture(name="products")
def _products(library_path: Path) -> Iterator[Products]:
    """Afterwards no tiles may be left configured: other code of the process would meet them."""
    made = Products(library_path)
    if "16 lanes" not in made.description:
        pytest.skip("no bfloat16 products on this processor")
    assert made.description == "16 lanes, bfloat16 products in AMX tiles"
    yield made
    made.close()
    assert made.library.amx_configured() == 0


def whole_numbers(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Small enough that sums of thousands of products are exact in float32."""
    return torch.randint(-9, 10, shape, generator=g).bfloat16()


@pytest.mark.parametrize("rows", ROWS)
def test_products_of_whole_numbers_are_exact(products: Products, rows: int) -> None:
    """Guards every index: a wrong row, column, pair, tile or pass is a wrong number, without any tolerance. Inputs fill
    no instruction, outputs no panel; row counts are around one and two tiles."""
    g = torch.Generator().manual_seed(rows)
    for inputs in INPUTS:
        x, weight = whole_numbers(g, rows, inputs), whole_numbers(g, PANEL + rows % 37, inputs)
        assert torch.equal(products.summed(x, weight), x.float() @ weight.float().T), f"{inputs} inputs"


@pytest.mark.parametrize(("rows", "inputs"), DEEP)
def test_passes_over_deep_products_add_up(products: Products, rows: int, inputs: int) -> None:
    g = torch.Generator().manual_seed(inputs)
    x, weight = whole_numbers(g, rows, inputs), whole_numbers(g, 40, inputs)
    assert torch.equal(products.summed(x, weight), x.float() @ weight.float().T)


@pytest.mark.parametrize("inputs", [1, 64, 100, 1055])
def test_products_with_bias_against_float64(products: Products, inputs: int) -> None:
    """One rounding to bfloat16, at most 2^-8 of the number, and float32 sums before it."""
    g = torch.Generator().manual_seed(inputs)
    x, weight = (torch.randn(n, inputs, generator=g).bfloat16() for n in (37, 50))
    bias, y = torch.randn(2 * PANEL, generator=g), torch.empty(37, 50).bfloat16()
    products.linear(x, products.pack(weight), y, bias)
    truth = x.double() @ weight.double().T + bias[:50].double()
    size = x.double().abs() @ weight.double().abs().T + bias[:50].double().abs()
    assert ((y.double() - truth).abs() <= truth.abs() * 2**-8 + size * inputs * 2**-24).all()


@pytest.mark.parametrize("inputs", [31, 96, 1055])
def test_a_row_is_the_same_alone_and_in_company(library_path: Path, products: Products, inputs: int) -> None:
    """To the bit, whatever the tiles of its company, the pieces that rows are cut into and the threads."""
    g = torch.Generator().manual_seed(inputs)
    x, weight = (torch.randn(n, inputs, generator=g).bfloat16() for n in (300, 70))
    packed, all_rows = products.pack(weight), torch.empty(300, 70)
    products.sums(x, packed, all_rows)
    several = Products(library_path, threads=3)
    for team in (products, several):
        for rows in ROWS:
            some = torch.empty(rows, 70)
            team.sums(x[300 - rows :], packed, some)
            assert torch.equal(some, all_rows[300 - rows :]), f"{rows} rows"
    several.close()


@pytest.mark.parametrize("inputs", [1, 33, 545])
def test_neighbours_are_not_read(products: Products, inputs: int) -> None:
    """Odd rows: what is read past the end of one is the next one, which holds NaN here."""
    g = torch.Generator().manual_seed(inputs)
    x, weight = torch.randn(66, inputs, generator=g).bfloat16(), torch.randn(40, inputs, generator=g).bfloat16()
    want = products.summed(x, weight)
    x[1::2] = float("nan")
    got = products.summed(x, weight)
    assert torch.equal(got[::2], want[::2])
    assert got[1::2].isnan().all()


@pytest.mark.parametrize("rows", [1, 17, 97, 230])
def test_8_bit_weights_go_through_the_same_tiles(products: Products, rows: int) -> None:
    """To the bit what the same integers give as bfloat16 weights: slices end where instructions do."""
    g, narrow = torch.Generator().manual_seed(rows), Int8Products(products.library)
    for inputs in (33, 256, 770):
        weight = torch.randint(-127, 128, (40, inputs), generator=g, dtype=torch.int8)
        x, bias = torch.randn(rows, inputs, generator=g).bfloat16(), torch.zeros(40)
        assert torch.equal(narrow.int8(x, weight, torch.ones(40), bias), narrow.plain(x, weight.bfloat16()))
    narrow.close()


def test_nothing_is_touched_beyond_the_tensors(library_path: Path, products: Products) -> None:
    """Guards against reads and writes past either end, by the processor itself."""
    tests = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(tests / "support" / "guarded_products.py"), str(library_path)]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("equal\n", "", 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_errs_no_more_than_the_plain_one(products: Products, name: str) -> None:
    """SwiGLU, residuals, biases, attention with and without windows: root mean square error of the logits against
    float32 on the same weights."""
    config = CONFIGS[name]
    step = make_step(config, len(name), sequences=SEQUENCES).copy(torch.bfloat16)
    truth = step.copy(torch.float32).run(widened(config, "bfloat16"))
    errors = []
    for decoder in (plain(config, "bfloat16"), NativeDecoder(plain(config, "bfloat16"), products.library)):
        errors.append(float((step.copy(torch.bfloat16).run(decoder) - truth).square().mean().sqrt()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (7, 1, 24), (3, 3, 64), (2, 1, 80), (8, 1, 128)]
)
@pytest.mark.parametrize("window", [None, 50])
def test_attention_alone_is_the_oracles(
    products: Products, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    """Heads that are whole instructions and such that are not, chunks that begin and end within tiles; against float64
    with the tolerance of the other kernels."""
    lens = ((1, 1, 40, 70), (1, 300, 45, 560))
    case = make_case(Shape(*lens, heads, kv_heads, head_dim, window=window, dtype=torch.bfloat16), seed=head_dim)
    kernels = CpuKernels(NativeAttention(products.library))
    q = kernels.rope_and_write_kv(case.q, case.k, case.v, case.cos, case.sin, case.kv_cache, 1, case.meta)
    got = kernels.paged_attention(q, case.kv_cache, 1, case.meta, case.scale, window)
    want = expected_attention(case, q, expected_rope(case, case.k).bfloat16(), case.v)
    assert float((got.double() - want).abs().max()) < 2e-2


@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_do_not_depend_on_their_batch(products: Products, threads: int) -> None:
    """To the bit, through attention too, on threads of which each shapes tiles of its own."""
    config = CONFIGS["window"]
    decoder = NativeDecoder(plain(config, "bfloat16"), products.library)
    step = make_step(config, 3, sequences=SEQUENCES).copy(torch.bfloat16)
    torch.set_num_threads(threads)
    try:
        assert_alone_as_in_company(decoder, step, SEQUENCES)
    finally:
        torch.set_num_threads(1)


def test_chunks_of_a_prompt_are_the_whole_prompt(products: Products) -> None:
    """To the bit, K and V too: tiles of queries begin elsewhere in each chunk."""
    config = replace(CONFIGS["window"], num_layers=2)
    decoder = NativeDecoder(plain(config, "bfloat16"), products.library)
    step = make_step(config, 4, sequences=((600, 600),)).copy(torch.bfloat16)
    pool, at, parts = step.pool.clone(), 0, []
    want = step.run(decoder)
    for queries in (16, 100, 1, 395, 87, 1):
        at += queries
        meta = build_attention_meta([queries], [at], step.tables, 16, CPU, 0)
        parts.append(replace(step, ids=step.ids[at - queries : at], meta=meta, pool=pool).run(decoder))
    assert torch.equal(torch.cat(parts), want)
    assert torch.equal(pool.nan_to_num(), step.pool.nan_to_num())


def test_a_tiny_models_tokens_are_those_of_the_other_path(products: Products, tiny_model: TinyModels) -> None:
    """Greedy tokens in bfloat16: the paths round differently, but no token of these prompts hangs on that."""
    make = partial(load_model, tiny_model("llama"), CPU, "bfloat16")
    tiled = NativeDecoder(make().decoder, products.library)
    avx = native_decoder(make().decoder)
    prompts = probe_prompts()[:4]
    (got, want) = (generate(decoder, prompts, 12) for decoder in (tiled, avx))
    assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.parametrize(
    ("variable", "value", "described"),
    [
        ("KVB_TEST_DECLINE", "1", "16 lanes, bfloat16 products; the system declined AMX"),
        ("KVBATON_AMX", "0", "16 lanes, bfloat16 products; AMX is off (KVBATON_AMX=0)"),
    ],
)
def test_without_tiles_the_same_library_takes_the_other_path(
    library_path: Path,
    products: Products,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    described: str,
) -> None:
    """No tile instruction, and to the bit what a library without this path gives: products and a whole decoder."""
    monkeypatch.setenv(variable, value)
    again = Products(Path(shutil.copy(library_path, tmp_path / "again.so")))  # asks anew
    assert again.description == described
    own = native_library()
    assert own is not None
    if "tiles" in own.kvb_describe().decode():
        pytest.skip("this processor has tiles: there is no library without them to compare with")
    g = torch.Generator().manual_seed(5)
    plain_products = Products(Path(own._name))
    for rows, inputs in ((1, 64), (33, 100), (97, 1200)):
        x, weight = torch.randn(rows, inputs, generator=g).bfloat16(), torch.randn(50, inputs, generator=g).bfloat16()
        assert torch.equal(again.summed(x, weight), plain_products.summed(x, weight))
    step = make_step(CONFIGS["gqa"], 6, sequences=SEQUENCES).copy(torch.bfloat16)
    decoders = [NativeDecoder(plain(CONFIGS["gqa"], "bfloat16"), library) for library in (again.library, own)]
    assert torch.equal(step.copy(torch.bfloat16).run(decoders[0]), step.copy(torch.bfloat16).run(decoders[1]))
    assert again.library.amx_instructions() == 0
    again.close()
    plain_products.close()


def test_inner_loops_are_tiles_and_nothing_else(tmp_path: Path) -> None:
    """What the compiler makes for the processors that this is for: four products of four loads (two of three for up to
    16 rows) and the cache lines asked for; sums never leave their tiles."""
    compiler = compiler_with(tmp_path, "-march=sapphirerapids")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    source, made = tmp_path / "tile.c", tmp_path / "tile.o"
    source.write_text('#include "amx.h"\nvoid *tile(void) { return amx_tile; }\n')
    flags = ("-O3", "-march=sapphirerapids", "-std=gnu11", "-fPIC", "-c", f"-I{SOURCES}")
    subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True, timeout=600)
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", made], capture_output=True, text=True, check=True)
    loops = [loop for loop in inner_loops(listing.stdout) if any("tdpbf16ps" in line for line in loop)]
    words = ("tdpbf16ps", "tileloadd", "prefetch")
    counts = {tuple(sum(word in line for line in loop) for word in words) for loop in loops}
    assert counts == {(products, loads, lines) for products, loads in ((2, 3), (4, 4)) for lines in (0, 16, 32)}
    assert not [line for loop in loops for line in loop if re.search(r"tilestored|tilezero|%[xyz]mm", line)]


def inner_loops(listing: str) -> list[list[str]]:
    """Instructions from the target of each backward jump to the jump, where no other such range lies inside."""
    found = re.findall(r"^\s+([0-9a-f]+):\t(.*)$", listing, re.MULTILINE)
    at = {int(address, 16): index for index, (address, _) in enumerate(found)}
    ranges = []
    for index, (_, text) in enumerate(found):
        jump = re.match(r"j\w+\s+([0-9a-f]+) ", text)
        target = at.get(int(jump[1], 16), index + 1) if jump else index + 1
        if target <= index:
            ranges.append((target, index))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    return [[text for _, text in found[first : last + 1]] for first, last in inner]


def test_the_plain_decoder_is_not_what_is_tested(products: Products) -> None:
    """Guards the guards: where tiles are emulated, products and a decoder do pass through the emulation."""
    if "tiles" in str(getattr(native_library(), "kvb_describe", bytes)()):
        pytest.skip("this processor has tiles")
    decoder = NativeDecoder(plain(CONFIGS["gqa"], "bfloat16"), products.library)
    before = products.library.amx_instructions()
    make_step(CONFIGS["gqa"], 1, sequences=((5, 5),)).copy(torch.bfloat16).run(decoder)
    assert products.library.amx_instructions() > before
