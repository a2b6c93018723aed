"""The op library alone serves exported models: no Python package, and no Python."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels.backends import native_module
from seqkernels.testing import assert_close_to_oracle
from tests.from_the_field.stock_models import cast
from tests.static.project import ROOT

pytestmark = [
    pytest.mark.skipif(native_module.module is None, reason="there is no native module"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LIBRARY = Path(seqkernels.__file__).parent / "lib" / "libseqkernels.so"
SHAPE = (3, 9, 16)


class Model(nn.Module):
    """Every op but request scoring."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.linear = nn.Linear(16, 40)
        self.head = nn.Sequential(nn.BatchNorm1d(40), nn.ReLU())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(x, src_key_padding_mask=mask)
        scores: Tensor = self.head(self.linear(tokens.mean(1)))
        return scores


def exported(folder: Path) -> tuple[torch.export.ExportedProgram, Tensor, Tensor]:
    """Save the program of the swapped model and its inputs; return both."""
    x = torch.randn(SHAPE)
    mask = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    with torch.no_grad():
        swapped = Model().eval()
        policy = seqkernels.PrecisionPolicy(bf16=("linear",))
        assert len(seqkernels.swap(swapped, precision_policy=policy).replaced) >= 3
        program = torch.export.export(swapped, (x, mask))
    torch.export.save(program, folder / "model.pt2")
    torch.save((x, mask), folder / "tensors.pt")
    return program, x, mask


def hold_to_stock(result: Tensor, x: Tensor, mask: Tensor) -> None:
    """The numerics rule, by the stock model in fp64 and in bf16."""
    with torch.inference_mode():
        golden, low = (
            cast(Model().eval(), dtype)(x, mask) for dtype in (torch.float64, torch.bfloat16)
        )
    # All users as one draw: the scores of a single one are too few for a yardstick.
    assert_close_to_oracle(*(t.flatten()[None] for t in (result, golden, low)))


def run_python(code: str, folder: Path) -> str:
    """In a process that loads the op library and has no seqkernels."""
    start = f"import sys, torch\nsys.modules['seqkernels'] = None\nlibrary = {str(LIBRARY)!r}\n"
    start += f"root = {str(ROOT)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_exported_program_is_loaded_and_follows_its_weights(tmp_path: Path) -> None:
    _, x, mask = exported(tmp_path)
    run_python(
        """
        torch.ops.load_library(library)
        x, mask = torch.load("tensors.pt")
        model = torch.export.load("model.pt2").module()
        with torch.inference_mode():
            before = model(x, mask)
            torch.save(before, "result.pt")
            assert torch.equal(model(x, mask), before)
            weights = dict(model.named_parameters())
            weights["encoder.layers.0.linear1.weight"].data.mul_(-3)  # which torch does not count
            assert (model(x, mask) - before).abs().max() > 1e-2
            weights["encoder.layers.0.linear1.weight"].data.div_(-3)
            torch.testing.assert_close(model(x, mask), before, rtol=1e-4, atol=1e-5)
        """,
        tmp_path,
    )
    hold_to_stock(torch.load(tmp_path / "result.pt"), x, mask)


def test_what_needs_python_is_refused(tmp_path: Path) -> None:
    told = run_python(
        """
        torch.ops.load_library(library)
        ops = torch.ops.seqkernels
        norm = (torch.zeros(4), torch.ones(4), None, None)
        def refused(run):
            try:
                run()
            except (ValueError, RuntimeError) as error:
                print(error)
        run = lambda x, activation, backend: ops.resilient_batch_norm(
            x, *norm, 1e-5, 0.0, None, activation, 0.01, backend)
        print(run(torch.ones(2, 4), "relu", "auto")[0, 0].item())
        refused(lambda: run(torch.ones(2, 4), "relu", "reference"))
        refused(lambda: run(torch.ones(2, 4), "swish", "auto"))
        refused(lambda: run(torch.ones(2, 4).double(), "relu", "auto"))
        refused(lambda: run(torch.ones(2, 5), "relu", "auto"))
        """,
        tmp_path,
    ).splitlines()
    assert float(told[0]) == pytest.approx(1.0, rel=1e-4)
    assert "backend: expected auto or cpu without Python, got 'reference'" in told[1]
    assert "activation: expected one of none, relu, gelu, gelu_tanh, leaky_relu" in told[2]
    assert "x: expected float32 or bfloat16" in told[3]
    assert "x: expected [N, C] or [N, C, L] with C = 4, got shape (2, 5)" in told[4]


def test_the_instruction_set_of_the_environment_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQKERNELS_ISA", "sse9")
    told = run_python(
        """
        torch.ops.load_library(library)
        try:
            torch.ops.seqkernels.linear(
                torch.ones(1, 4), [torch.ones(2, 4), *[None] * 9], [], [], "none", 0.01, "bf16",
                "auto")
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "isa: expected one of" in told
    assert "'sse9'" in told


def test_the_package_may_come_later(tmp_path: Path) -> None:
    """What torch has called of the library goes on, and is Python's from then on."""
    run_python(
        """
        torch.ops.load_library(library)
        packet = torch.ops.seqkernels.linear
        overload = packet.default
        call = (torch.ones(1, 4), [torch.ones(2, 4), *[None] * 9], [], [], "none", 0.01, "bf16")
        before = packet(*call, "auto")
        del sys.modules["seqkernels"]
        sys.path.insert(0, root)
        import seqkernels
        for op in (packet, overload, torch.ops.seqkernels.linear):
            assert torch.equal(op(*call, "auto"), before)
            assert torch.equal(op(*call, "reference"), before)  # which the library refuses
        assert seqkernels.backends.calls["reference"] == 3
        """,
        tmp_path,
    )


@pytest.mark.exhaustive
def test_a_program_in_cpp_serves_a_package(tmp_path: Path) -> None:
    program, x, mask = exported(tmp_path)
    package = str(tmp_path / "package.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch_folder = Path(torch.__file__).parent
    server = tmp_path / "serve_package"
    build = [
        os.environ.get("CXX", "c++"),
        "-std=c++20",
        "-O0",
        f"-isystem{torch_folder / 'include'}",
        str(ROOT / "tests/cpp/serve_package.cpp"),
        f"-L{torch_folder / 'lib'}",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
        *("-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", str(server)),
    ]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (tmp_path / "x.bin").write_bytes(x.numpy().tobytes())
    (tmp_path / "mask.bin").write_bytes(mask.numpy().tobytes())
    sizes = [str(n) for n in SHAPE]
    run = [str(server), str(LIBRARY), package, "x.bin", "mask.bin", *sizes, "out.bin"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = torch.frombuffer(bytearray((tmp_path / "out.bin").read_bytes()), dtype=torch.float32)
    hold_to_stock(out, x, mask)
