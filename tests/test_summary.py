from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Module, Trainer
from trainkit.summary import LayerSummary, ModelSummary, get_human_readable_count, sizes_of, summarize


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4)))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.features(batch).mean((2, 3))).mean() * self.scale

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_table_lists_layers_parameters_modes_and_totals() -> None:
    net = Net()
    net.head.eval()
    assert str(summarize(net)) == (
        "layer      type        parameters  mode\n"
        "features   Sequential          48  train\n"
        "head       Linear              10  eval\n"
        "(its own)                       1\n"
        "total                          59  under 0.01 MB\n"
        "all trainable\n"
        "5 layers in train mode, 1 in eval mode"
    )


def test_deeper_layers_are_indented() -> None:
    assert str(summarize(Net(), max_depth=-1)) == (
        "layer      type         parameters  mode\n"
        "features   Sequential           48  train\n"
        "  0        Conv2d               40  train\n"
        "  1        ReLU                  0  train\n"
        "  2        Sequential            8  train\n"
        "    0      BatchNorm2d           8  train\n"
        "head       Linear               10  train\n"
        "(its own)                        1\n"
        "total                           59  under 0.01 MB\n"
        "all trainable"
    )
    assert summarize(Net(), max_depth=2).layer_names == [
        "features", "features.0", "features.1", "features.2", "head",
    ]  # fmt: skip


def test_frozen_parameters_are_told_apart_in_the_totals() -> None:
    net = Net()
    net.head.requires_grad_(False)
    summary = summarize(net)
    assert (summary.total_parameters, summary.trainable_parameters, summary.non_trainable_parameters) == (59, 49, 10)
    assert "49 trainable, 10 non-trainable" in str(summary)
    assert "none trainable" in str(summarize(net.head))


def test_shared_parameters_count_once_in_the_totals() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    summary = summarize(nn.Sequential(first, second))
    assert summary.param_nums == [72, 72]
    assert summary.total_parameters == 80


def test_lazy_layers_are_listed_without_a_count() -> None:
    summary = summarize(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    assert summary.total_parameters == 12
    assert "not known yet" in str(summary)
    assert str(summary).endswith("lazy layers get their parameters, and count, with the first batch")


def test_the_size_is_in_megabytes_of_the_parameters_own_precision() -> None:
    assert summarize(nn.Linear(1000, 1000, bias=False)).model_size == 4.0
    assert "4.0 MB" in str(summarize(nn.Linear(1000, 1000, bias=False)))
    assert summarize(nn.Linear(1000, 1000, bias=False).half()).model_size == 2.0


def test_long_names_keep_the_table_within_80_columns() -> None:
    class LayerWithAVeryLongNameThatNobodyWouldType(nn.Linear):
        pass

    net = nn.Module()
    net.add_module("an_extraordinarily_long_name_for_a_layer", LayerWithAVeryLongNameThatNobodyWouldType(1000, 1000))
    assert max(map(len, str(summarize(net)).splitlines())) <= 80


@pytest.mark.parametrize("depth", [-2, 1.5, True, "1"])
def test_a_depth_that_means_nothing_is_an_error_at_construction(depth: Any) -> None:
    with pytest.raises(ValueError, match="max_depth must be -1"):
        summarize(nn.Linear(1, 1), depth)


class WithExample(Module):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2).eval()
        self.unused = nn.Linear(2, 2)
        self.example_input_array = example
        self.seen: list[Any] = []

    def forward(self, x: Any, scale: Any = 1) -> Any:
        self.seen.append((self.training, torch.is_grad_enabled(), x.dtype, torch.rand(())))
        return {"out": self.head(self.net(x) * scale)}["out"], "extra"


EXAMPLES = {
    "a tensor": torch.ones(4, 16),
    "positional arguments": (torch.ones(4, 16), torch.ones(1)),
    "keyword arguments": {"x": torch.ones(4, 16), "scale": 2},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_gives_the_sizes_and_the_operations(kind: str) -> None:
    module = WithExample(EXAMPLES[kind])
    summary = summarize(module, max_depth=-1)
    assert summary.layer_names == ["net", "net.0", "net.1", "head", "unused"]
    assert summary.in_sizes == [[4, 16], [4, 16], [4, 8], [4, 8], "?"]
    assert summary.out_sizes == [[4, 8], [4, 8], [4, 8], [4, 2], "?"]
    per_layer = [sum(counts.values()) for counts in summary.flop_counts.values()]
    assert per_layer == [2 * 4 * 16 * 8, 2 * 4 * 16 * 8, 0, 2 * 4 * 8 * 2, 0]
    assert summary.total_flops == 2 * 4 * 16 * 8 + 2 * 4 * 8 * 2
    assert str(summary) == (
        "layer   type        parameters  mode   FLOPs  in       out\n"
        "net     Sequential         136  train  1.0 K  [4, 16]  [4, 8]\n"
        "  0     Linear             136  train  1.0 K  [4, 16]  [4, 8]\n"
        "  1     Dropout              0  train      0  [4, 8]   [4, 8]\n"
        "head    Linear              18  eval     128  [4, 8]   [4, 2]\n"
        "unused  Linear               6  train      0  ?        ?\n"
        "total                      160  under 0.01 MB\n"
        "all trainable\n"
        "4 layers in train mode, 1 in eval mode\n"
        "1.2 K FLOPs in a forward pass of example_input_array"
    )


def test_calling_with_the_example_leaves_modes_random_state_and_gradients_as_they_were() -> None:
    module = WithExample(torch.ones(4, 16))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    summarize(module)
    assert torch.equal(torch.get_rng_state(), before)
    ((training, gradients, _, _),) = module.seen
    assert (training, gradients) == (False, False)
    assert module.training
    assert module.net[1].training
    assert not module.head.training
    assert not any(part._forward_hooks for part in module.modules())


def test_the_example_is_run_in_the_precision_of_the_run() -> None:
    module = WithExample(torch.ones(4, 16))
    module.train()
    module.training_step = lambda batch, batch_idx: module(batch)[0].mean()  # type: ignore[method-assign]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)  # type: ignore[method-assign]
    Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, precision="64-true",
        accelerator="cpu",
    ).fit(module, torch.utils.data.DataLoader(torch.ones(2, 16), 2))  # type: ignore[arg-type]  # fmt: skip
    assert {dtype for _, _, dtype, _ in module.seen} == {torch.float64}


def test_an_example_that_does_not_fit_says_who_called() -> None:
    module = WithExample(torch.ones(4, 3))
    with pytest.raises(RuntimeError) as caught:
        summarize(module)
    assert "example_input_array" in caught.value.__notes__[0]
    assert module.training


def test_wide_tables_stay_within_80_columns() -> None:
    module = WithExample((torch.ones(4, 16), torch.ones(1, 1, 1, 1, 1)))
    module.add_module("an_extraordinarily_long_name_for_a_layer", nn.Linear(3000, 3000))
    assert max(map(len, str(summarize(module, -1)).splitlines())) <= 80


def test_the_size_counts_each_parameter_in_its_own_dtype() -> None:
    assert (
        summarize(nn.Sequential(nn.Linear(1000, 1000, bias=False).half(), nn.Linear(1000, 500, bias=False))).model_size
        == 4.0
    )


def test_modes_count_all_layers_listed_or_not() -> None:
    summary = ModelSummary(WithExample(None), max_depth=1)
    assert summary.total_training_modes == {"train": 4, "eval": 1}
    assert summary.training_modes == [True, False, True]
    assert summary.layer_types == ["Sequential", "Linear", "Linear"]
    assert summary.total_layer_params == summary.total_parameters == 160
    assert summary.total_flops == 0


def test_one_layer_notes_its_first_call_only() -> None:
    layer = nn.Linear(3, 2)
    summary = LayerSummary(layer)
    assert (summary.in_size, summary.out_size, summary.num_parameters) == ("?", "?", 8)
    for batch in (4, 5):
        layer(torch.ones(batch, 3))
    assert (summary.in_size, summary.out_size, summary.layer_type) == ([4, 3], [4, 2], "Linear")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0  "), (999, "999  "), (1000, "1.0 K"), (20480, "20.5 K"), (131584, "131 K"), (3 * 10**9, "3.0 B"),
     (4 * 10**14, "400 T"), (5 * 10**15, "5,000 T")],
)  # fmt: skip
def test_numbers_are_short(number: int, text: str) -> None:
    assert get_human_readable_count(number) == text


def test_what_has_no_size_has_an_unknown_one() -> None:
    assert [sizes_of(value) for value in ([], (), torch.tensor(0), {}, [torch.ones(2), []])] == [
        *(["?"] * 4),
        [[2], "?"],
    ]
