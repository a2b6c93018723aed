"""What must not change a bit of the encoder's result, and what it must not touch."""

import dataclasses
import itertools
import math
import os
import signal
import threading
import traceback
import warnings

import pytest
import torch
from torch import Tensor

from seqkernels import settings
from seqkernels.options import EncoderOptions
from seqkernels.testing import EncoderCase, EncoderProblem
from tests.backends.encoder_runs import on_each_isa, run

# Both kinds of result, odd and even shapes, all fusions.
CASES = {
    "sequence": EncoderCase(batch=7, length=37, mask="holes"),
    "computed": EncoderCase(batch=7, length=50, mask="right", padding="compute", norm_first=True),
    "summary": EncoderCase(
        batch=7, length=33, mask="right", latest_k=4, pool="max", fusion="concat",
        dtype=torch.bfloat16,
    ),
    "append": EncoderCase(
        batch=7, length=20, mask="left", latest_k=4, pool="max", fusion="append",
        order="latest_last", padding="exclude", d_model=20, dim_feedforward=7,
    ),
    "sharp": EncoderCase(batch=7, length=100, sharpen=40.0, mask="right", num_layers=1),
    "empty": EncoderCase(batch=7, length=18, mask="empty", final_norm=True, d_model=24, nhead=3),
}  # fmt: skip
on_each_case = pytest.mark.parametrize("name", CASES)


def select(problem: EncoderProblem, rows: list[int]) -> EncoderProblem:
    def pick(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[rows]

    return dataclasses.replace(
        problem,
        x=problem.x[rows],
        candidate=pick(problem.candidate),
        key_padding_mask=pick(problem.key_padding_mask),
        lengths=pick(problem.lengths),
    )


@on_each_isa
@on_each_case
def test_batch_does_not_matter(name: str, isa: str) -> None:
    problem = CASES[name].problem()
    whole = run(problem, isa)
    for rows in ([0], [6], [3, 2], [6, 5, 4, 3, 2, 1, 0], [1, 1, 1, 5], list(range(7)) * 9):
        assert torch.equal(run(select(problem, rows), isa), whole[rows])


@on_each_isa
@on_each_case
def test_neighbours_do_not_matter(name: str, isa: str) -> None:
    problem = CASES[name].problem()
    whole = run(problem, isa)
    for value in (math.nan, 1e30, 0.0):
        x = problem.x.clone()
        x[[0, 2, 3, 5, 6]] = value
        assert torch.equal(run(dataclasses.replace(problem, x=x), isa)[[1, 4]], whole[[1, 4]])


@on_each_isa
@on_each_case
def test_runs_and_threads_do_not_matter(name: str, isa: str) -> None:
    problem = select(CASES[name].problem(), list(range(7)) * 3)
    once = run(problem, isa)
    for threads in (2, 1, 3, 5, 1):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(run(problem, isa), once)


@on_each_isa
@pytest.mark.parametrize("padding", ["zero", "compute"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("summary", [(None, "none"), (8, "max"), (3, "none")])
def test_threads_that_share_a_sequence_do_not_matter(
    summary: tuple[int | None, str], norm_first: bool, padding: str, isa: str
) -> None:
    """Few and long sequences, so that several threads work on one."""
    case = EncoderCase(
        length=120, mask="right", valid=(120, 90, 33), padding=padding, norm_first=norm_first,
        latest_k=summary[0], pool=summary[1],
    )  # fmt: skip
    # What NaN a thread finds is not lost where the threads' maxima are combined.
    for problem in (case.problem(), dataclasses.replace(case, poison=math.nan).problem()):
        torch.set_num_threads(1)
        once = run(problem, isa)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for rows in ([0], [1], [0, 1, 2], [0, 1, 2, 0, 1]):
                result = run(select(problem, rows), isa)
                assert torch.equal(result.isnan(), once[rows].isnan())
                assert torch.equal(result.nan_to_num(), once[rows].nan_to_num())


@on_each_isa
@on_each_case
def test_form_of_the_mask_does_not_matter(name: str, isa: str) -> None:
    problem = CASES[name].problem()
    whole = run(problem, isa)
    mask = problem.key_padding_mask
    assert mask is not None
    forms: list[tuple[Tensor | None, Tensor | None]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        forms.append((torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -math.inf), None))
    wide = torch.ones(14, 111, dtype=torch.bool)[::2, : 3 * mask.shape[1] : 3]
    if wide.shape == mask.shape:
        forms.append((wide.copy_(mask), None))
    forms.append((mask.t().contiguous().t(), None))
    lengths = (~mask).sum(1)
    if CASES[name].mask in ("right", "empty"):
        forms.append((None, lengths))
        forms.append((None, lengths.int()))
        forms.append((None, torch.stack([lengths, -lengths], 1)[:, 0]))
    for key_padding_mask, lengths_ in forms:
        other = dataclasses.replace(problem, key_padding_mask=key_padding_mask, lengths=lengths_)
        assert torch.equal(run(other, isa), whole)
    if mask.all(1).any() or name == "summary":
        nobody = dataclasses.replace(problem, key_padding_mask=torch.zeros_like(mask))
        bare = dataclasses.replace(problem, key_padding_mask=None)
        assert torch.equal(run(nobody, isa), run(bare, isa))


@on_each_isa
@on_each_case
def test_layout_does_not_matter(name: str, isa: str) -> None:
    case = CASES[name]
    whole = run(case.problem(), isa)
    for layout in ("offset", "strided", "transposed", "last_dim"):
        other = dataclasses.replace(case, layout=layout).problem()
        assert torch.equal(run(other, isa), whole), layout


@on_each_isa
@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
def test_one_user_for_many_candidates(fusion: str, isa: str) -> None:
    """Rows that share their memory (stride 0)."""
    problem = EncoderCase(batch=5, length=19, fusion=fusion, mask="holes").problem()
    mask = problem.key_padding_mask
    assert mask is not None
    shared = dataclasses.replace(
        problem,
        x=problem.x[:1].expand(5, -1, -1),
        key_padding_mask=mask[:1].expand(5, -1),
    )
    copied = dataclasses.replace(
        problem,
        x=problem.x[:1].repeat(5, 1, 1),
        key_padding_mask=mask[:1].repeat(5, 1),
    )
    assert torch.equal(run(shared, isa), run(copied, isa))
    if problem.candidate is not None:
        one = dataclasses.replace(problem, candidate=problem.candidate[:1].expand(5, -1))
        repeated = dataclasses.replace(problem, candidate=problem.candidate[:1].repeat(5, 1))
        assert torch.equal(run(one, isa), run(repeated, isa))


@on_each_isa
@on_each_case
def test_padded_slots_do_not_matter(name: str, isa: str) -> None:
    case = CASES[name]
    clean = case.problem()
    mask = clean.key_padding_mask
    assert mask is not None
    whole = run(clean, isa)
    kept = ~mask
    for value in (0.0, math.nan, math.inf, -math.inf, 1e38):
        result = run(dataclasses.replace(case, poison=value).problem(), isa)
        if case.padding == "compute":
            assert torch.equal(result[kept], whole[kept]), value
        else:
            assert torch.equal(result, whole), value


@on_each_isa
@pytest.mark.parametrize("length", [21, 32, 64, 100])
def test_length_to_which_a_batch_is_padded_does_not_matter(length: int, isa: str) -> None:
    """A longer user in the batch makes it longer, and changes nothing else."""
    case = EncoderCase(batch=5, length=20, mask="right", latest_k=4, pool="max", fusion="concat")
    for padding in ("zero", "exclude"):
        short = dataclasses.replace(case, padding=padding, valid=(19, 20, 1, 5, 16)).problem()
        mask = short.key_padding_mask
        assert mask is not None
        if padding == "zero":  # no position of the short one may be without padding then
            short = select(short, [0, 2, 3, 4])
            mask = short.key_padding_mask
            assert mask is not None
        x = short.x.new_full((len(short.x), length, short.x.shape[2]), math.nan)
        x[:, :20] = short.x
        longer = torch.ones(len(short.x), length, dtype=torch.bool)
        longer[:, :20] = mask
        long = dataclasses.replace(short, x=x, key_padding_mask=longer)
        assert torch.equal(run(long, isa), run(short, isa))


@on_each_isa
def test_several_threads_call_at_once(isa: str) -> None:
    problems = [case.problem() for case in CASES.values()]
    expected = [run(problem, isa) for problem in problems]
    torch.set_num_threads(2)
    failures: list[str] = []
    start = threading.Barrier(4)

    def work(offset: int) -> None:
        try:
            start.wait()
            for i in range(30):
                n = (i + offset) % len(problems)
                with torch.inference_mode():
                    if not torch.equal(problems[n].run("cpu"), expected[n]):
                        failures.append(f"problem {n} differs")
        except BaseException:
            failures.append(traceback.format_exc())

    with settings.override(isa=isa):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@on_each_isa
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use(isa: str) -> None:
    problem = select(CASES["summary"].problem(), list(range(7)) * 3)
    torch.set_num_threads(2)
    expected = run(problem, isa)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads may be lost
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)  # a child that hangs is ended
            with settings.override(isa=isa), torch.inference_mode():
                same = [torch.equal(problem.run("cpu"), expected) for _ in range(3)]
            status = 0 if all(same) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run(problem, isa), expected)


def run_into(problem: EncoderProblem, out: Tensor, isa: str) -> None:
    """Run the native op alone, writing its result into `out`."""
    ops = torch.ops.seqkernels
    options = EncoderOptions(**problem.options)
    tensors = (problem.x, problem.candidate, None, problem.key_padding_mask, problem.lengths, None)
    packed = ops.pack_encoder(list(problem.weights), *options, isa)
    ops.encoder_packed.out(*tensors, *packed, out=out)


@on_each_isa
@on_each_case
def test_writes_its_output_and_nothing_else(name: str, isa: str) -> None:
    case = CASES[name]
    problem = case.problem()
    given = [problem.x, problem.candidate, problem.key_padding_mask, *problem.weights]
    before = [None if t is None else t.clone() for t in given]
    whole = run(problem, isa)
    for after, then in itertools.zip_longest(given, before):
        assert after is None or torch.equal(after, then)

    sentinel = -12345.0
    for gap in (0, 1, 16):
        around = whole.new_full([n + 2 * gap for n in whole.shape], sentinel)
        inner = tuple(slice(gap, gap + n) for n in whole.shape)
        run_into(problem, around[inner], isa)
        assert torch.equal(around[inner], whole)
        around[inner] = sentinel
        assert (around == sentinel).all()


@on_each_isa
@pytest.mark.parametrize("fill", [math.nan, 0.0, 1e30])
def test_every_value_of_the_output_is_written(fill: float, isa: str) -> None:
    for case in CASES.values():
        problem = case.problem()
        whole = run(problem, isa)
        out = torch.full_like(whole, fill)
        run_into(problem, out, isa)
        assert torch.equal(out, whole)


@on_each_isa
def test_offsets_beyond_32_bits(isa: str) -> None:
    """Strides so large that 32-bit offsets wrap; only the pages touched take memory."""
    problem = EncoderCase(batch=2, length=9, dtype=torch.bfloat16).problem()
    expected = run(problem, isa)
    stride = 2**31 + 64
    far = torch.empty(stride + 9 * 96, dtype=torch.bfloat16).as_strided((2, 9, 96), (stride, 96, 1))
    far.copy_(problem.x)
    assert torch.equal(run(dataclasses.replace(problem, x=far), isa), expected)
    run_into(dataclasses.replace(problem, x=problem.x), far, isa)
    assert torch.equal(far, expected)


@on_each_isa
def test_workspace_of_a_thread_is_small(isa: str) -> None:
    """At the reference shape; long and wide problems need more."""
    case = EncoderCase()
    problem = case.problem()
    options = EncoderOptions(**problem.options)
    model, _ = torch.ops.seqkernels.pack_encoder(list(problem.weights), *options, isa)
    assert 0 < torch.ops.seqkernels.encoder_workspace_bytes(model, case.length + 1) <= 2 * 2**20
