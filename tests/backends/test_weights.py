"""Packed weights follow the parameters, are shared by calls, and live no longer than they."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels.backends import cpu, native_module, weights

D, HEADS, FF = 16, 2, 8
native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")


class Packing:
    """The native ops, with a count of what is packed."""

    def __init__(self) -> None:
        self.count = 0
        self.living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def pack_encoder(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += 1
        model, packed = torch.ops.seqkernels.pack_encoder(*arguments)
        self.living.add(packed)
        return model, packed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.seqkernels, name)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Packing:
    counter = Packing()
    monkeypatch.setattr(cpu.CpuBackend, "ops", counter)
    return counter


def make(layers: int = 2) -> seqkernels.nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = seqkernels.nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True)
    norm = nn.LayerNorm(D)
    return seqkernels.nn.TransformerEncoder(layer, layers, norm).eval()


X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(2))


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = module(X)
    return result


def fresh(module: nn.Module) -> Tensor:
    """What the module's parameters give, nothing kept from before."""
    other = copy.deepcopy(module)
    return run(other)


@native
def test_packed_once(packing: Packing) -> None:
    module = make()
    first = run(module)
    assert packing.count == 1
    for _ in range(3):
        assert torch.equal(run(module), first)
    with torch.no_grad():
        assert torch.equal(module(X), first)
    assert packing.count == 1


def edit_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.layers[1].linear1.weight.mul_(1.5)  # type: ignore[index, union-attr]


def edit_under_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.layers[0].norm2.bias.add_(1.0)  # type: ignore[index, union-attr]


def load_a_state(module: nn.Module) -> None:
    module.load_state_dict({k: v + 0.1 for k, v in module.state_dict().items()})


def load_by_assignment(module: nn.Module) -> None:
    state = {k: v + 0.1 for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def round_to_bf16_and_back(module: nn.Module) -> None:
    module.bfloat16().float()


def exchange_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.1


def exchange_data_twice(module: nn.Module) -> None:
    exchange_data(module)
    exchange_data(module)


def optimizer_step(module: nn.Module) -> None:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(X).square().mean().backward()
    optimizer.step()
    module.eval()


def fused_optimizer_step(module: nn.Module) -> None:
    """Torch counts no edit of a fused step; the module stays in eval mode."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def another_parameter(module: nn.Module) -> None:
    linear = module.layers[0].linear2  # type: ignore[index, union-attr]
    linear.weight = nn.Parameter(torch.randn(D, FF))  # type: ignore[union-attr]


def another_submodule(module: nn.Module) -> None:
    module.layers[0].linear1 = nn.Linear(D, FF)  # type: ignore[index, union-attr]


def hidden_edit_between_training_and_evaluation(module: nn.Module) -> None:
    """As averages of weights are put in place: torch counts no edit through .data."""
    module.train()
    for parameter in module.parameters():
        parameter.data.mul_(1.1)
    module.eval()


def transposed_data(module: nn.Module) -> None:
    """A view of the same memory: neither the address nor the version shows it."""
    for layer in module.layers:  # type: ignore[union-attr]
        weight = layer.self_attn.out_proj.weight  # type: ignore[union-attr]
        weight.data = weight.data.t()


def through_one_vector(module: nn.Module) -> None:
    """An edit of the vector that the parameters are parts of."""
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector, module.parameters())
    run(module)
    vector.mul_(0.9)
    nn.utils.vector_to_parameters(vector, module.parameters())


def a_flat_buffer(module: nn.Module) -> None:
    """The same without telling the parameters."""
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector, module.parameters())
    run(module)
    vector.mul_(0.9)


def swapped_tensors(module: nn.Module) -> None:
    weight = module.layers[0].linear1.weight  # type: ignore[index, union-attr]
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))


def hidden_edit_while_one_layer_trains(module: nn.Module) -> None:
    layer = module.layers[1]  # type: ignore[index]
    layer.train()  # type: ignore[union-attr]
    layer.linear1.weight.data.mul_(1.5)  # type: ignore[union-attr]
    layer.eval()  # type: ignore[union-attr]


def warmed_up_in_training_mode(module: nn.Module) -> None:
    module.train()
    seqkernels.warmup(module, X)
    for parameter in module.parameters():
        parameter.data.mul_(1.1)
    module.eval()


def explained_in_training_mode(module: nn.Module) -> None:
    module.train()
    seqkernels.explain(module, X)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    module.eval()


def through_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, module.parameters())


EDITS = [
    edit_in_place,
    edit_under_inference_mode,
    load_a_state,
    load_by_assignment,
    round_to_bf16_and_back,
    exchange_data,
    exchange_data_twice,
    optimizer_step,
    fused_optimizer_step,
    another_parameter,
    another_submodule,
    hidden_edit_between_training_and_evaluation,
    through_vector,
    transposed_data,
    through_one_vector,
    a_flat_buffer,
    swapped_tensors,
    hidden_edit_while_one_layer_trains,
    warmed_up_in_training_mode,
    explained_in_training_mode,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_next_call_uses_the_new_values(edit: Callable[[nn.Module], None]) -> None:
    module = make()
    for _ in range(3):
        before = run(module)
        edit(module)
        after = run(module)
        assert torch.equal(after, fresh(module))
        if edit is not round_to_bf16_and_back:
            assert not torch.equal(after, before)
    assert torch.equal(run(module), after)


def test_a_new_storage_at_an_old_address_is_noticed() -> None:
    """Without gradients or versions in the way: the allocator likes to return the same block."""
    module = make(1)
    parameter = module.layers[0].linear1.weight
    for step in range(50):
        run(module)
        parameter.data = parameter.data.to(torch.float64)
        parameter.data = (parameter.data * (1 + 0.01 * step)).to(torch.float32)
        assert torch.equal(run(module), fresh(module))


def test_hidden_edits_are_seen_after_a_check() -> None:
    module = make()
    before = run(module)
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 1.1
    seqkernels.recheck_weights()
    assert not torch.equal(run(module), before)
    assert torch.equal(run(module), fresh(module))


@native
def test_a_check_packs_only_what_changed(packing: Packing) -> None:
    changed, same = make(), make()
    for module in (changed, same):
        run(module)
    changed.layers[0].linear1.weight.data.mul_(1.5)
    seqkernels.recheck_weights()
    for module in (changed, same):
        run(module)
    assert packing.count == 3


def test_a_new_parameter_of_the_same_memory() -> None:
    """With an identity, an address and a version that were seen before."""
    module, memory = make(), torch.randn(FF, D)
    for _ in range(6):
        module.layers[0].linear1.weight = nn.Parameter(memory.data)
        assert torch.equal(run(module), fresh(module))
        memory.mul_(1.5)


def test_weights_without_version_counters_are_never_stale() -> None:
    with torch.inference_mode():
        module = make()
    assert next(module.parameters()).is_inference()
    for _ in range(3):
        before = run(module)
        with torch.inference_mode():
            module.layers[0].linear1.weight.mul_(1.5)
        after = run(module)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(module))


@native
def test_weights_without_version_counters_are_packed_once(packing: Packing) -> None:
    with torch.inference_mode():
        module = make()
    run(module)
    run(module)
    assert packing.count == 1


@native
def test_each_instruction_set_has_its_own(packing: Packing) -> None:
    module = make()
    for _ in range(2):
        for isa in ("portable", "avx2"):
            with seqkernels.settings.override(isa=isa):
                run(module)
    assert packing.count == len({s.name for s in cpu.isa_table() if s.name in ("portable", "avx2")})


@native
def test_nothing_outlives_the_module(packing: Packing) -> None:
    modules = [make() for _ in range(3)]
    for module in modules:
        run(module)
    assert len(packing.living) == 3
    parameter = weakref.ref(modules[0].layers[0].linear1.weight)
    del module, modules
    gc.collect()
    assert parameter() is None
    assert not packing.living


@native
@pytest.mark.parametrize("move", [nn.Module.double, nn.Module.bfloat16, nn.Module.share_memory])
def test_nothing_outlives_a_move(packing: Packing, move: Callable[[nn.Module], None]) -> None:
    module = make()
    run(module)
    move(module)
    assert not packing.living


@native
def test_replaced_parameters_drop_what_was_packed(packing: Packing) -> None:
    module = make()
    run(module)
    another_parameter(module)
    run(module)
    assert len(packing.living) == 1


@native
def test_graphs_find_their_weights_and_lose_them(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_registry", {})  # other tests' weights may live on
    module = make()
    with torch.no_grad():
        program = torch.export.export(module, (X,)).module()
        run(program)
        run(program)
        assert packing.count == len(weights._registry) == 1
        for parameter in program.parameters():
            parameter.mul_(1.1)
        run(program)
        assert packing.count == 2
    del module, program, parameter
    gc.collect()
    assert not weights._registry
    assert not packing.living


@native
def test_repeated_edits_do_not_accumulate(packing: Packing) -> None:
    module = make()
    for _ in range(5):
        edit_in_place(module)
        run(module)
    gc.collect()
    assert packing.count == 5
    assert len(packing.living) == 1


def test_copies_and_pickles_carry_no_packed_weights() -> None:
    module = make()
    before = len(pickle.dumps(module))
    expected = run(module)
    data = pickle.dumps(module)
    assert len(data) == before
    assert torch.equal(run(pickle.loads(data)), expected)
    duplicate = copy.deepcopy(module)
    edit_in_place(module)
    assert torch.equal(run(duplicate), expected)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False)), run(module))


@native
def test_threads_pack_once_and_agree(packing: Packing) -> None:
    module = make()
    expected = fresh(module)
    packing.count = 0
    start = threading.Barrier(8)
    results: list[Tensor] = []

    def work() -> None:
        start.wait()
        for _ in range(20):
            results.append(run(module))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(torch.equal(result, expected) for result in results)
    assert packing.count == 1


@native
def test_threads_that_edit_their_own_models() -> None:
    failures = []

    def work(seed: int) -> None:
        module = make()
        for _ in range(20):
            edit_in_place(module)
            if not torch.equal(run(module), fresh(module)):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
