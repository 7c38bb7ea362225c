"""The command `trainkit`: fit, validate, test and predict from YAML files and dotted options. Files: file_commands.py.

    trainkit fit --config configs/digits.yaml --trainer.max_epochs 3

    main -> read the command line -> files and options -> jsonargparse -> Trainer, module, data -> trainer.fit(...)

Nothing here imports torch before a command needs it, so that `--help` and `--version` answer at once. What knows
jsonargparse is in `trainkit.config`. Exit codes: 0 done, 1 the run failed, 2 the command line or a config is wrong,
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1, 140 SIGUSR2 (0 when SLURM has queued the job again).
"""

from __future__ import annotations

import inspect
import linecache
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainkit import __version__, file_commands
from trainkit.errors import CheckpointError, MisconfigurationException, nearest
from trainkit.redaction import redacted_words

if TYPE_CHECKING:
    from trainkit import DataModule, Module, Trainer
    from trainkit.config.document import Node
    from trainkit.config.problems import Problem
    from trainkit.config.record import RecordConfig

HELP = f"""\
trainkit {__version__}: train PyTorch models from one YAML file and one command

usage: trainkit COMMAND --config FILE [--KEY VALUE ...]

commands:
  fit        train a model
  validate   run its validation data once
  test       run its test data once
  predict    run it on new data
  certify    kill a training run at random, and prove that it goes on exactly

  inspect    show what is in a checkpoint, and whether it is whole
  convert    make a checkpoint of another program's file, or a file of its weights

  trainkit COMMAND --help    the options of a command
  trainkit --version         the version

example:
  trainkit fit --config configs/digits.yaml --trainer.max_epochs 3
"""

DOES = {
    "fit": "train a model",
    "validate": "run a model on its validation data and print the metrics",
    "test": "run a model on its test data and print the metrics",
    "predict": "run a model on new data",
}

COMMAND_HELP = """\
trainkit {command}: {does}

usage: trainkit {command} --config FILE [--config FILE2 ...] [--KEY VALUE ...]

options:
  -c, --config FILE     a YAML file; several are merged in order, options win over files
  --ckpt_path PATH      the checkpoint to {start}; last is the newest one of the newest run
  --seed_everything N   the seed (default 0, or $PL_GLOBAL_SEED); false seeds nothing
{own}  --print_config        print the config that would run and exit;
                        --print_config=skip_default or =skip_null prints less
  -h, --help            this page

keys, in a file or as options:
  trainer        --trainer.max_epochs 3  --trainer.precision bf16-mixed
  model          --model package.module.Class  --model.lr 1e-3
  data           --data package.module.Class  --data.batch_size 64
  optimizer      --optimizer AdamW  --optimizer.lr 1e-3
                 for a model without configure_optimizers
  lr_scheduler   --lr_scheduler CosineAnnealingLR  --lr_scheduler.T_max 10
                 --lr_scheduler.interval step  --lr_scheduler.monitor val/loss

  A class is given by its path or, when trainkit or torch has it, by its short name:
  --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss  adds a callback
  --trainer.logger CSVLogger --trainer.logger.save_dir runs                chooses the logger

more help:
  trainkit {command} --trainer.help                   every argument of the Trainer
  trainkit {command} --trainer.callbacks.help         the callbacks there are
  trainkit {command} --trainer.callbacks.help Timer   the arguments of one
  trainkit {command} --model.help package.module.Class
"""


class UsageError(Exception):
    """A command line that can't be read; `hint` says what to write instead."""

    def __init__(self, message: str, hint: str = "", manual: str = "trainkit --help") -> None:
        super().__init__(message)
        self.hint, self.manual = hint, manual


@dataclass
class CommandLine:
    """What a command line says."""

    command: str
    files: list[str] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)
    """Names without their dashes, and values, in order."""
    help: bool = False
    print_config: str | None = None
    """None, or the flags behind --print_config."""
    about: tuple[str, str] | None = None
    """--KEY.help CLASS as (KEY, CLASS)."""
    words: list[str] = field(default_factory=list)
    """The arguments that start the same run again."""

    @property
    def manual(self) -> str:
        """The command that explains this one."""
        return f"trainkit {self.command} --help"

    @property
    def again(self) -> str:
        """The command that starts the same run again, quoted for a shell; a checkpoint may be added."""
        return self._shown(self.words)

    @property
    def harmless(self) -> str:
        """The same without secrets, for a file."""
        return self._shown(redacted_words(self.words))

    def _shown(self, words: Sequence[str]) -> str:
        module = sys.argv[0].endswith(os.path.join("trainkit", "__main__.py"))
        program = ["python", "-m", "trainkit"] if module else ["trainkit"]
        return shlex.join([*program, self.command, *words])


def main(args: Sequence[str] | None = None, prepare: Callable[[Trainer], None] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        args: the words after `trainkit`; None takes those of the process.
        prepare: is given the Trainer before it runs.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = _main(words, prepare)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `trainkit ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        if not isinstance(error, SystemExit):  # else the run has told where it stopped and how to go on
            _tell("interrupted")
        return 130


def _main(words: list[str], prepare: Callable[[Trainer], None] | None) -> int:
    if not words:
        sys.stderr.write(HELP)
        return 2
    if words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] == "--version":
        print(f"trainkit {__version__}")
        return 0
    if words[0] in file_commands.COMMANDS:
        return file_commands.main(words[0], words[1:])
    try:
        if words[0] == "certify":
            from trainkit.testing import command

            return command.main(words[1:])
        line = read(words)
    except UsageError as error:
        _tell(f"error: {error}", f"   = {error.hint}" if error.hint else "", _see(error.manual))
        return 2
    if line.help:
        sys.stdout.write(_command_help(line.command))
        return 0
    usual, path = warnings.formatwarning, list(sys.path)
    warnings.formatwarning = _format_warning
    sys.path.insert(0, os.getcwd())  # the user's own modules
    try:
        return _run(line, prepare)
    finally:
        warnings.formatwarning, sys.path[:] = usual, path


def _command_help(command: str) -> str:
    start = "go on from" if command == "fit" else "load"
    own = "  --output FILE         keep the predictions: torch.save of what predict_step returned\n"
    return COMMAND_HELP.format(
        command=command, does=DOES[command], start=start, own=own if command == "predict" else ""
    )


# ---------------------------------------------------------------- the command line
def read(words: Sequence[str]) -> CommandLine:
    """Read the words after `trainkit`.

    Raises:
        UsageError: no such command, a word that is no option, or an option without its value.
    """
    command, *rest = words
    if command not in DOES:
        if command.startswith("-"):
            raise UsageError(f"no command before {command!r}", f"for example: trainkit fit {shlex.join(words)}")
        raise UsageError(f"no command {command!r}", nearest(command, [*DOES, "certify", *file_commands.COMMANDS]))
    line = CommandLine(command)
    position = 0
    while position < len(rest):
        word = rest[position]
        name, equals, value = word.partition("=")
        position += 1
        if word in ("-h", "--help"):
            line.help = True
            continue
        if name == "--print_config":
            line.print_config = value
            continue
        if not word.startswith("--") and name != "-c":
            hint = f"did you mean --config {shlex.quote(word)}?" if word.endswith((".yaml", ".yml")) else ""
            raise UsageError(
                f"unexpected {word!r}", hint or "options begin with --, as in --trainer.max_epochs 3", line.manual
            )
        following = rest[position : position + 1]
        has_value = bool(following) and not _is_option(following[0])
        if name.endswith(".help"):
            if not equals and has_value:
                value = following[0]
                position += 1
            line.about = (name[2:].removesuffix(".help"), value)
            continue
        if not equals:
            if not has_value:
                raise UsageError(f"{name} needs a value", f"for example {name} {_example(name)}", line.manual)
            value = following[0]
            position += 1
        if name in ("-c", "--config"):
            line.files.append(value)
        else:
            line.options.append((name[2:], value))
        if name != "--ckpt_path":
            line.words += [word] if equals else [word, value]
    return line


def _is_option(word: str) -> bool:
    return word.startswith("--") or word in ("-c", "-h")


def _example(name: str) -> str:
    return {"-c": "config.yaml", "--config": "config.yaml", "--ckpt_path": "last"}.get(name, "1")


# ---------------------------------------------------------------- a run
def _run(line: CommandLine, prepare: Callable[[Trainer], None] | None) -> int:
    from trainkit.config.build import UserCodeError
    from trainkit.config.problems import ConfigError

    try:
        return _run_checked(line, prepare)
    except ConfigError as error:
        _tell(str(error), f"{error.summary}nothing was started; {_see(line.manual)}")
        return 2
    except UserCodeError as error:
        _tell(str(error), "nothing was started")
        return 1


def _run_checked(line: CommandLine, prepare: Callable[[Trainer], None] | None = None) -> int:
    from trainkit import launch
    from trainkit.config import build, explain, manual, parser, record, signatures, tree
    from trainkit.config.problems import ConfigError
    from trainkit.random import seed_everything

    files, problems = _read_files(line.files)
    configured = parser.make_parser(line.command)
    asked = tree.Tree(files, line.options, signatures.parser_parameters(configured))
    if line.about is not None:
        print(manual.page(asked, *line.about))
        return 0
    try:
        config = parser.parse(configured, line.files, line.options)
    except Exception as refusal:  # a class path imports the user's module, which may raise anything
        raise ConfigError(problems + explain.explain(asked, refusal)) from refusal
    problems += explain.unsaid(asked, config)
    if problems:
        raise ConfigError(problems)
    if line.print_config is not None:
        sys.stdout.write(parser.dump(parser.printed(configured, config, line.print_config)))
        return 0
    build.check(config, asked, line.command)
    if config.seed_everything is not False:
        seed = None if config.seed_everything is True else config.seed_everything
        config.seed_everything = seed_everything(seed, workers=True, verbose=False)
    recorder = record.RecordConfig(parser.resolved(configured, config), f"trainkit {__version__}: {line.harmless}")
    trainer = build.make_trainer(configured, config, asked, [recorder])
    trainer.command = line.again
    if prepare is not None:
        prepare(trainer)
    if launch.needed(trainer.strategy.world) and launch.can_run_again():
        return _launch(line, trainer)
    module, data = build.make_module(configured, config, asked, line.command)
    return _start(line, trainer, module, data, config, recorder)


def _launch(line: CommandLine, trainer: Trainer) -> int:
    """Run the command in several processes, in which the model is made; this one waits for them."""
    from trainkit import launch

    try:
        launch.launch(trainer, line.command, {})
    except MisconfigurationException as error:
        _tell(f"error: {error}", f"nothing was started; {_see(line.manual)}")
        return 2
    return 0


def _read_files(paths: Sequence[str]) -> tuple[list[Node], list[Problem]]:
    """Read the config files, and what is wrong with them although they can be read."""
    from trainkit.config import document
    from trainkit.config.problems import ConfigError, Problem

    nodes, problems, unreadable = [], [], []
    for path in paths:
        try:
            node, found = document.read(path)
        except ConfigError as error:
            unreadable += error.problems
        else:
            nodes.append(node)
            problems += found
            section = node.find("trainer")
            if section is not None and not isinstance(section.content, (dict, str, type(None))):
                hint = "write one argument a line below it, `max_epochs: 3` for example; or take the key out"
                unreadable.append(
                    Problem("expected a mapping: the arguments of Trainer", section.where, "trainer", hint)
                )
    if unreadable:
        raise ConfigError(unreadable + problems)
    return nodes, problems


def _start(
    line: CommandLine, trainer: Trainer, module: Module, data: DataModule | None, config: Any, recorder: RecordConfig
) -> int:
    """Run the command and turn how it ends into an exit code."""
    from trainkit.config import parser
    from trainkit.config.problems import ConfigError

    run = getattr(trainer, line.command)
    arguments = set(inspect.signature(run).parameters) - parser.DATA_ARGUMENTS
    given = {key: value for key, value in vars(config).items() if key in arguments}
    try:
        if line.command == "predict":
            _predict(trainer, module, data, config.output, given)
        else:
            run(module, datamodule=data, **given)
    except ConfigError:
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        if line.command == "fit" and (trainer.interrupted or isinstance(error, KeyboardInterrupt)):
            _tell_interruption(trainer, error)
        if isinstance(error, SystemExit):
            raise
        return 130
    except (MisconfigurationException, CheckpointError, ValueError, TypeError) as error:
        if not isinstance(error, (MisconfigurationException, CheckpointError)) and not _is_deliberate(error):
            raise
        stepped = recorder.first_step is not None and trainer.global_step > recorder.first_step
        _tell(f"error: {error}", *_where(error), "" if stepped else f"nothing was started; {_see(line.manual)}")
        return 1 if stepped else 2
    return 0


def _predict(
    trainer: Trainer, module: Module, data: DataModule | None, output: str | None, given: dict[str, Any]
) -> None:
    import torch

    from trainkit.config.problems import ConfigError, Problem

    if output is not None:
        folder = os.path.dirname(os.path.abspath(output))
        if not os.path.isdir(folder) or os.path.isdir(output):
            wrong = f"{output!r} is a directory" if os.path.isdir(output) else f"there is no directory {folder!r}"
            raise ConfigError(Problem(f"the predictions can't be written: {wrong}", key="output"))
    given["return_predictions"] = output is not None or given.get("return_predictions") or False
    predictions = trainer.predict(module, datamodule=data, **given)
    if not trainer.is_global_zero:
        return
    if output is None:
        print("predictions are kept by --output FILE, or by a callback that writes them")
        return
    unfinished = f"{output}.{os.getpid()}.unfinished"
    torch.save(predictions, unfinished)
    os.replace(unfinished, output)
    print(f"predictions written: {output} (torch.load reads them)")


# ---------------------------------------------------------------- what is told
def _tell(*lines: str) -> None:
    """Print lines on stderr, where the results are not."""
    sys.stdout.flush()
    print(*filter(None, lines), sep="\n", file=sys.stderr)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Show a warning; of trainkit's own only the text, because where it was raised tells the user nothing."""
    if filename.startswith((os.path.dirname(__file__) + os.sep, "<frozen runpy>")) or filename == sys.argv[0]:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _see(manual: str) -> str:
    return f"see `{manual}`"


def _tell_interruption(trainer: Trainer, error: BaseException) -> None:
    """Tell where a run stopped that has saved nothing, where no progress bar does; others have told how they go on."""
    from trainkit.resume_hint import checkpoints_of, where_it_ended

    bar = trainer.progress_bar_callback
    if (bar is None or not getattr(bar, "is_enabled", True)) and not checkpoints_of(trainer)[1]:
        _tell(where_it_ended(trainer, error))


def _is_deliberate(error: BaseException) -> bool:
    """Whether trainkit itself raised an error to tell the user something; others keep their traceback."""
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__")).partition(".")[0] == "trainkit"
    return ours and linecache.getline(frame.f_code.co_filename, number).lstrip().startswith("raise ")


def _where(error: BaseException) -> list[str]:
    """Return the place in the user's own code that an error came through, if it did."""
    from trainkit.config.explain import user_frames

    return [f"  --> {frame}" for frame in user_frames(error, limit=1)]
