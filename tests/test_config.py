"""The parts of trainkit.config by themselves: places, trees, types in words, classes, the record of a run."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.config import document, explain, parser, signatures
from trainkit.config.document import Node, from_plain, merge
from trainkit.config.problems import FEW, SHOWN, ConfigError, Place, Problem, suggest
from trainkit.config.record import RecordConfig
from trainkit.config.tree import Tree
from trainkit.errors import MisconfigurationException
from trainkit.loggers import CSVLogger, Logger

HERE = Place("here")


def read(path: Path, text: str) -> Node:
    path.write_text(text)
    node, duplicates = document.read(str(path))
    assert not duplicates
    return node


@pytest.fixture(scope="module")
def parameters() -> signatures.Parameters:
    return signatures.parser_parameters(parser.make_parser("fit"))


# ---------------------------------------------------------------- problems
def test_a_problem_shows_the_line_and_a_caret() -> None:
    place = Place("run.yaml", 12, 5, 3, "  a: xyz")
    told = str(Problem("wrong", place, "a", "do this\nand that"))
    assert told.splitlines() == [
        "error: wrong",
        "  --> run.yaml:12:5  (a)",
        "   12 |   a: xyz",
        "      |     ^^^",
        "   = do this",
        "   = and that",
    ]


def test_a_problem_without_a_place_shows_its_key_only() -> None:
    assert str(Problem("wrong", key="trainer")) == "error: wrong\n  --> (trainer)"
    assert str(Problem("wrong")) == "error: wrong"


def test_the_caret_stays_in_the_line_and_long_lines_have_no_excerpt() -> None:
    assert Place("f", 1, 3, 99, "abcd").excerpt()[1].endswith("|   ^^")
    assert Place("f", 1, 2, 1, "\tx").excerpt()[1].endswith("| \t^")
    assert not Place("f", 1, 1, 1, "x" * 500).excerpt()


def test_an_error_shows_the_first_problems_and_counts_all() -> None:
    error = ConfigError([Problem(f"number {i}") for i in range(SHOWN + 3)])
    assert str(error).count("error:") == SHOWN
    assert error.summary == f"{SHOWN + 3} problems; "
    assert isinstance(error, MisconfigurationException)
    assert not ConfigError(Problem("one")).summary


def test_suggestions_name_the_close_one_or_few() -> None:
    assert suggest("max_epoch", ["max_epochs", "x"]) == "did you mean 'max_epochs'?"
    assert suggest("zzz", ["a", "b"]) == "known: a, b"
    many = suggest("zzz", [f"name_{i}" for i in range(50)])
    assert many.startswith("the nearest of 50: ")
    assert many.count("name_") == FEW


# ---------------------------------------------------------------- documents
def test_every_value_knows_where_it_and_its_key_stand(tmp_path: Path) -> None:
    node = read(tmp_path / "a.yaml", "a:\n  - b: 1e-3\n    c: 'x'\n")
    item = node.find("a")
    assert item is not None
    inner = item.content[0].find("b")
    assert (inner.place.line, inner.place.column, inner.place.length) == (2, 8, 4)
    assert (inner.key_place.line, inner.key_place.column) == (2, 5)
    assert inner.content == 1e-3
    assert node.plain() == {"a": [{"b": 1e-3, "c": "x"}]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("'1e-3'", "1e-3"),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("", None),
        (".inf", float("inf")),
        ("2026-11-23", "2026-11-23"),
        ("a b", "a b"),
        ('"#"', "#"),
        ("|\n  two\n  lines", "two\nlines\n"),
    ],
)
def test_values_are_read_as_jsonargparse_reads_them(text: str, value: object, tmp_path: Path) -> None:
    assert read(tmp_path / "a.yaml", f"a: {text}\n").plain() == {"a": value}


def test_anchors_and_merge_keys_mean_what_yaml_says(tmp_path: Path) -> None:
    text = "base: &b {lr: 1, width: 2}\nmodel: {<<: *b, lr: 3}\nother: *b\nboth: {<<: [{lr: 9}, *b]}\n"
    # of several merged mappings the first wins (https://yaml.org/type/merge.html); PyYAML 6.0.4 has it the other way
    expected = {**yaml.safe_load(text), "both": {"lr": 9, "width": 2}}
    assert read(tmp_path / "a.yaml", text).plain() == expected


@pytest.mark.parametrize(
    "text", ["1e5", "12e4567", "1_0e3", "true", "null", "~", "3", ".5", "2026-11-23", "a: b", "", "-"]
)
def test_a_string_that_looks_like_something_else_stays_a_string(text: str, tmp_path: Path) -> None:
    assert read(tmp_path / "a.yaml", parser.dump({"key": text})).plain() == {"key": text}
    assert jsonargparse.get_loader("yaml")(parser.dump({"key": text})) == {"key": text}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abe1.-_: #'\"\n", max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab_", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_a_dumped_config_reads_back_as_itself(value: object) -> None:
    import tempfile

    config = {"key": value}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(parser.dump(config))
        file.flush()
        node, _ = document.read(file.name)
    assert node.plain() == config


def test_duplicate_keys_are_found_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: {b: 1, b: 2}\nc:\n  - d: 1\n    d: 2\na: 3\n")
    _, duplicates = document.read(str(tmp_path / "a.yaml"))
    assert [problem.key for problem in duplicates] == ["a.b", "c[0].d", "a"]


# ---------------------------------------------------------------- merging
def tree_of(value: Any) -> Node:
    return from_plain(value, HERE)


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": 1, "b": {"c": 1}}, {"b": {"d": 2}}, {"a": 1, "b": {"c": 1, "d": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [1]}, {"a+": 2}, {"a": [1, 2]}),
        ({"a": [1]}, {"a+": [2, 3]}, {"a": [1, 2, 3]}),
        ({"m": "p.A"}, {"m": {"init_args": {"x": 1}}}, {"m": {"class_path": "p.A", "init_args": {"x": 1}}}),
        ({"m": {"class_path": "p.A", "init_args": {}}}, {"m": "p.B"}, {"m": {"class_path": "p.B", "init_args": {}}}),
    ],
)
def test_a_later_tree_is_laid_over_an_earlier_one(below: Any, above: Any, merged: Any) -> None:
    assert merge(tree_of(below), tree_of(above)).plain() == merged


def test_arguments_of_a_class_that_was_replaced_are_marked() -> None:
    below = {"m": {"class_path": "p.A", "init_args": {"x": 1, "y": 2}}}
    merged = merge(tree_of(below), tree_of({"m": {"class_path": "p.B", "init_args": {"y": 3}}}))
    arguments = merged.find("m", "init_args")
    assert arguments is not None
    assert {name: node.inherited for name, node in arguments.content.items()} == {"x": True, "y": False}


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("trainer.max_epochs", "3", "trainer.max_epochs"),
        ("optimizer.lr", "1", "optimizer.init_args.lr"),
        ("optimizer.init_args.lr", "1", "optimizer.init_args.lr"),
        ("trainer.logger.save_dir", "x", "trainer.logger.init_args.save_dir"),
        ("trainer.callbacks.patience", "3", "trainer.callbacks[1].init_args.patience"),
        ("lr_scheduler.interval", "step", "lr_scheduler.interval"),
        ("lr_scheduler.gamma", "1", "lr_scheduler.init_args.gamma"),
        ("nonsense.deep", "1", "nonsense.deep"),
    ],
)
def test_an_option_lands_where_jsonargparse_puts_it(
    option: str, value: str, key: str, parameters: signatures.Parameters
) -> None:
    file = tree_of(
        {
            "trainer": {"logger": "CSVLogger", "callbacks": ["Timer", "EarlyStopping"]},
            "optimizer": "Adam",
            "lr_scheduler": {"class_path": "StepLR"},
        }
    )
    tree = Tree([file], [(option, value)], parameters)
    node = tree.find(key)
    assert node is not None
    assert node.place.source == f"command line: --{option} {value}"


def test_a_problem_stands_at_the_nearest_key_that_was_written(parameters: signatures.Parameters) -> None:
    tree = Tree([tree_of({"trainer": {"max_epochs": 3}})], [("trainer.devices", "1")], parameters)
    assert tree.problem("x", "trainer.callbacks[0].init_args.monitor").place == HERE
    place = tree.problem("x", "trainer.devices").place
    assert place is not None
    assert place.source == "command line: --trainer.devices 1"
    assert Tree([], [], parameters).problem("x", "model").place is None


# ---------------------------------------------------------------- types in words
class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (int | None, "a whole number or null"),
        (None | float, "a number or null"),
        (int | float | None, "a number or null"),
        (bool | int, "true, false or a whole number"),
        (bool | None, "true, false or null"),
        (Literal["min", "max"], '"min" or "max"'),
        (Literal["norm", 2] | None, '"norm", 2 or null'),
        (list[int], "a list of whole numbers"),
        (tuple[float, ...], "a list of numbers"),
        (Iterable[str], "a list of strings"),
        (list, "a list"),
        (dict[str, int], "a mapping"),
        (str | os.PathLike[str] | None, "a string, a path or null"),
        (str | timedelta, "a string or a timedelta"),
        (Colour, '"RED" or "BLUE"'),
        (list[Callback] | Callback | None, "a list of Callbacks, a Callback or null"),
        (Logger | bool, "a Logger, true or false"),
        (nn.Module, "a Module"),
        (Any, "anything"),
    ],
)
def test_a_type_is_described_in_words(hint: Any, words: str) -> None:
    assert signatures.describe(hint) == words


@pytest.mark.parametrize(
    ("hint", "value", "refused"),
    [
        (int, "3", False),
        (int, 3.0, True),
        (int, True, True),
        (float, 3, False),
        (float, "1e-3", False),
        (str, 3, True),
        (bool, 1, True),
        (int | None, None, False),
        (Literal["a"], "b", True),
        (list[int], ["x"], True),
        (Any, object(), False),
    ],
)
def test_jsonargparse_alone_says_what_a_type_takes(hint: Any, value: Any, refused: bool) -> None:
    assert signatures.refuses(hint, value) is refused


def test_classes_are_slots_and_plain_types_are_not() -> None:
    assert signatures.bases(Logger | list[Logger] | bool | None) == (Logger,)
    assert signatures.bases(str | timedelta | Path | Colour | None) == ()


# ---------------------------------------------------------------- classes
class Base(Module):
    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()


class Heir(Base):
    """Passes on what it does not know."""

    def __init__(self, untyped, maybe: int | None, depth: int = 1, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
        super().__init__(**kwargs)


def test_a_class_has_its_own_arguments_and_those_behind_its_kwargs() -> None:
    found = signatures.class_parameters(Heir)
    assert set(found) == {"untyped", "maybe", "depth", "width", "lr"}
    assert {name for name, parameter in found.items() if parameter.required} == {"untyped", "maybe", "width"}  # type: ignore[union-attr]


def test_a_slot_s_own_arguments_can_be_left_out() -> None:
    assert "params" not in signatures.class_parameters(torch.optim.SGD, {"params"})


def make_net(width: int = 3) -> Base:
    return Base(width)


def make_anything(width: int = 3):  # type: ignore[no-untyped-def]
    return Base(width)


def test_a_function_that_says_what_it_returns_stands_for_a_class() -> None:
    made = signatures.find_class(f"{__name__}.make_net", (Module,))
    assert made is make_net
    assert signatures.made_by(made) is Base
    assert set(signatures.class_parameters(made)) == {"width"}
    with pytest.raises(signatures.ClassProblem, match="is a function, not a class"):
        signatures.find_class(f"{__name__}.make_anything", (Module,))


def test_short_names_are_looked_up_among_the_classes_that_fit() -> None:
    assert signatures.find_class("CSVLogger", (Logger,)) is CSVLogger
    with pytest.raises(signatures.ClassProblem, match="no Callback is called 'CSVLogger'"):
        signatures.find_class("CSVLogger", (Callback,))


def test_two_classes_of_one_name_need_their_paths() -> None:
    made = [type("Twin", (Callback,), {"__module__": f"{__name__}.{part}"}) for part in ("a", "b")]
    with pytest.raises(signatures.ClassProblem, match="2 classes are called 'Twin'") as problem:
        signatures.find_class("Twin", (Callback,))
    assert f"{__name__}.a.Twin or {__name__}.b.Twin" in problem.value.hint
    del made


def test_private_abstract_and_local_classes_have_no_short_name() -> None:
    class Local(Callback):
        pass

    known = signatures.known_classes((Callback,))
    assert "Local" not in known
    assert "RecordConfig" not in known
    assert "EarlyStopping" in known
    assert issubclass(Local, Callback)


@pytest.mark.parametrize("path", ["a-b.C", ".x", "x.", "..", "1.2"])
def test_what_is_no_path_is_refused_before_it_is_imported(path: str) -> None:
    with pytest.raises(signatures.ClassProblem, match="not a class path"):
        signatures.find_class(path, (Module,))


def test_a_class_inside_a_class_has_a_path() -> None:
    assert signatures.find_class("torch.nn.modules.linear.Linear", (nn.Module,)) is nn.Linear
    with pytest.raises(signatures.ClassProblem, match="has no attribute 'Inner'"):
        signatures.find_class("torch.nn.Linear.Inner", (nn.Module,))


def test_the_path_told_is_the_one_a_user_would_import() -> None:
    from trainkit.callbacks import EarlyStopping

    assert signatures.import_path(EarlyStopping) == "trainkit.callbacks.EarlyStopping"
    assert signatures.import_path(nn.Linear) == "torch.nn.Linear"


# ---------------------------------------------------------------- the parser
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_keys_are_lightnings(command: str) -> None:
    keys = set(signatures.parser_parameters(parser.make_parser(command)))
    assert {"seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path"} <= keys
    assert ("output" in keys) == (command == "predict")
    assert not keys & parser.DATA_ARGUMENTS - {"model"}


def test_every_argument_of_the_trainer_is_a_key() -> None:
    import inspect

    trainer = signatures.parser_parameters(parser.make_parser("fit"))["trainer"]
    assert isinstance(trainer, dict)
    assert set(trainer) == set(inspect.signature(Trainer).parameters)


def test_every_default_of_the_trainer_is_valid_in_a_file() -> None:
    made = parser.make_parser("fit")
    plain = parser.resolved(made, parser.parse(made, [], []))
    again = parser.parse(parser.make_parser("fit"), [], [])
    assert parser.resolved(made, again) == plain


def test_every_shipped_class_can_be_configured() -> None:
    for slot in (Callback, Logger):
        for cls in signatures.fitting_classes((slot,)):
            if cls.__module__.startswith("trainkit."):
                for name, parameter in signatures.class_parameters(cls).items():
                    assert isinstance(parameter, signatures.Parameter), f"{cls.__name__}.{name}"
                    assert parameter.hint is not Any, f"{cls.__name__}.{name} has no type to check"


def test_what_the_walk_does_not_find_is_told_in_the_parsers_words(parameters: signatures.Parameters) -> None:
    refusal = Exception(
        'Parser key "trainer.strategy":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
        "    - Expected a <class 'NoneType'>\n    - strategies are closed today\n  Given value: x"
    )
    tree = Tree([tree_of({"trainer": {"strategy": "auto"}})], [], parameters)
    (problem,) = explain.explain(tree, refusal)
    assert problem.title == "strategies are closed today"
    assert problem.key == "trainer.strategy"
    assert problem.place == HERE


# ---------------------------------------------------------------- the record of a run
class Tiny(Module):
    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        if keep:
            self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(1, 2))


class Remember(Logger):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def log_hyperparams(self, params: Any, metrics: Any = None) -> None:
        self.told.append(dict(params))


CONFIG = {"seed_everything": 1, "model": {"class_path": "Tiny", "init_args": {"keep": False}}}


def fit(folder: Path, module: Module, record: RecordConfig, logger: Any = False, **arguments: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[record],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )
    trainer.fit(module)
    return trainer


def test_a_run_records_its_config_and_never_writes_over_one(tmp_path: Path) -> None:
    for name in ("config.yaml", "config.resume-1.yaml", "config.resume-2.yaml"):
        record = RecordConfig(CONFIG, f"a header for {name}")
        fit(tmp_path, Tiny(), record)
        assert record.path == tmp_path / name
        text = (tmp_path / name).read_text()
        assert text.startswith(f"# a header for {name}\n")
        assert yaml.safe_load(text) == CONFIG
        assert record.first_step == 0


def test_a_trial_run_records_nothing(tmp_path: Path) -> None:
    record = RecordConfig(CONFIG, "")
    fit(tmp_path, Tiny(), record, fast_dev_run=True)
    assert record.path is None
    assert not list(tmp_path.iterdir())


def test_loggers_hear_of_the_config_unless_the_module_told_them(tmp_path: Path) -> None:
    logger = Remember()
    fit(tmp_path, Tiny(), RecordConfig(CONFIG, ""), logger)
    assert logger.told == [CONFIG]
    logger = Remember()
    fit(tmp_path, Tiny(keep=True), RecordConfig(CONFIG, ""), logger)
    assert logger.told == [{"keep": True}]


def test_a_directory_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match="can't be written"):
        fit(tmp_path / "file" / "below", Tiny(), RecordConfig(CONFIG, ""))


def test_data_that_saves_hyperparameters_is_enough(tmp_path: Path) -> None:
    class Data(DataModule):
        def __init__(self, size: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()

        train_dataloader = Tiny.train_dataloader

    logger = Remember()
    trainer = Trainer(
        max_epochs=1,
        callbacks=[RecordConfig(CONFIG, "")],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(Tiny(), datamodule=Data())
    assert logger.told == [{"size": 2}]
