"""`python -m qwen_ref.evaluate`: a checkpoint on the tasks of lm-evaluation-harness (the extra "eval").

MMLU, C-Eval, GSM8K, some thousand other tasks as the field runs them, and your own task files. The harness
is imported inside the functions, and only here and in harness.py.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.commands.cli import Parser, as_json, on_stdout, out_of_memory, run, say, utf8
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.files import decoded, output_path, write_whole
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import add_load_options, add_model_option, add_tokenizer_option
from qwen_ref.config import InputError, read_bytes
from qwen_ref.evaluate.guard import guarded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Declared = tuple[str, str]  # "group" or "task", and its name

_DECLARATION = re.compile(r"^(group|task):[ \t]*['\"]?([^\s'\"\[#]+)", re.MULTILINE)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.evaluate",
        description="Run tasks of lm-evaluation-harness on a first-generation Qwen checkpoint. "
        "The table goes to stdout, everything else to stderr.",
        epilog="Nothing is downloaded unless --download is given, and no code that a model wrote "
        "is run unless --run-unsafe-code is.",
    )

    def add(option: str, **how: Any) -> None:  # the harness's own command spells options with _
        spellings = dict.fromkeys((option, f"--{option[2:].replace('-', '_')}"))
        parser.add_argument(*spellings, **how)

    add_model_option(parser, fetched="the model and data sets")
    add(
        "--tasks",
        type=_names,
        required=True,
        metavar="TASK,TASK,…",
        help="names of the harness (wildcards allowed), task files (.yaml), or folders of them. What has a "
        "slash is a folder: ./mmlu, where mmlu is a task",
    )
    add(
        "--include-path",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="where the harness finds more tasks by name",
    )
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add(
        "--limit",
        type=float,
        metavar="N",
        help="only the first N questions of each task; below 1: this share of them",
    )
    add("--apply-chat-template", action="store_true", help="ask in ChatML, for chat checkpoints")
    add("--system", type=utf8, metavar="TEXT", help="the system message, or a text before every question")
    add("--gen-kwargs", metavar="NAME=VALUE,…", help="change the generation settings of tasks")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: %(default)s)")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a question with its answer; longer ones lose their beginning "
        "(default: the trained length)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="for tasks that sample or draw their examples (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FILE.json", help="write results and every question and answer here")
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--run-unsafe-code",
        action="store_true",
        help="run the programs that the model writes, as HumanEval does",
    )
    add_tokenizer_option(parser)
    add_load_options(parser)
    return parser


def _names(argument: str) -> list[str]:
    names = [name.strip() for name in argument.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{argument!r} names no task")
    return names


def _evaluate(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """What every rank does: the harness sends the same requests to each."""
    for name, least in (("num_fewshot", 0), ("batch_size", 1), ("max_length", 2), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise InputError(f"--limit {args.limit:g} must be a number above 0")
    if args.output is not None:
        output_path(args.output, "--output", args)
    files = _task_files([name for name in args.tasks if _is_path(name)])
    _, tokenizer = open_folder(folder, args.tokenizer_engine)
    defaults = read_defaults(folder, tokenizer)
    simple_evaluate, manager = _harness(args, files)
    names = [name for name in args.tasks if not _is_path(name)]
    if folders := _folders(manager, names):
        more = _task_files(folders)
        files |= more
        if any(declared and declared[0] == "group" for declared in more.values()):
            _, manager = _harness(args, files)  # it must know the parts of the group
    known = _known(manager, [name for name in names if name not in folders])
    if not args.run_unsafe_code:
        _refuse_code(manager, known, files, args.tasks)
    with guarded(args.run_unsafe_code):
        tasks = _tasks(manager, known, files, args.tasks)
    model = load(args, folder, ranks)

    from qwen_ref.evaluate.harness import MARK, HarnessModel

    adapter = HarnessModel(model, tokenizer, args.batch_size, args.max_length, defaults.stop_ids, args.seed)
    with guarded(args.run_unsafe_code), _of_harness("running", args.tasks):
        results = simple_evaluate(
            adapter,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            apply_chat_template=args.apply_chat_template,
            system_instruction=args.system,
            gen_kwargs=args.gen_kwargs,
            confirm_run_unsafe_code=args.run_unsafe_code,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
        )
    if ranks.rank > 0:
        return 0
    if adapter.truncated:
        say(
            f"note: {adapter.truncated} requests lost the beginning of their context, to fit into "
            f"{adapter.max_length} tokens; --max-length allows more"
        )
    if adapter.apart:
        say(
            f"note: {adapter.apart} requests were encoded in two parts, context and continuation: together "
            "a token would reach across their border"
        )
    results["config"].update(
        {"model": str(folder), "model_args": {"dtype": args.dtype, "device": args.device}}
    )
    whole = as_json(results, default=str).replace(MARK, "") + "\n"
    results.pop("samples", None)
    print(on_stdout(as_json(results, default=str) if args.json else _table(results)), flush=True)
    if args.output is not None:
        write_whole(args.output, whole)
    return 0


def _is_path(name: str) -> bool:
    """Whether a name of --tasks is a file or a folder, whatever tasks there are."""
    return name.endswith(".yaml") or "/" in name or os.sep in name


def _folders(manager: TaskManager, names: list[str]) -> list[str]:
    """The names that are files or folders here, and no tasks of the harness: those win, as elsewhere."""
    found = []
    for name in filter(os.path.exists, names):
        if not manager.match_tasks([name]):
            found.append(name)
        elif os.path.isdir(name):
            say(f"note: {name} is a task of the harness; --tasks ./{name} takes the folder of this name")
    return found


def _task_files(names: list[str]) -> dict[Path, Declared | None]:
    """The task files among the names, and those in the folders among them, each with what it declares.

    A folder may hold other .yaml files, which task files include. ValueError for a file that is not there.
    """
    found: dict[Path, Declared | None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = {file: _declared(file) for file in sorted(path.glob("*.yaml"))}
            if not any(inside.values()):
                unknown = "" if _is_path(name) else f"the harness knows no task {name!r}, and the folder "
                raise InputError(f"{unknown}{name} has no .yaml file with a task or a group")
            found.update((file, declared) for file, declared in inside.items() if declared)
        elif path.suffix == ".yaml" or path.is_file():
            if not path.exists():
                raise InputError(f"{name}: no such task file")
            if path.suffix != ".yaml":
                raise InputError(f"{name}: the name of a task file must end in .yaml")
            found[path] = _declared(path)
        else:
            raise InputError(f"{name}: no such folder or task file")
    return found


def _declared(file: Path) -> Declared | None:
    """("group" or "task", name), as the file says on a line of its own."""
    lines = dict(_DECLARATION.findall(decoded(str(file), read_bytes(file))))
    return next(((kind, lines[kind]) for kind in ("group", "task") if kind in lines), None)


def _harness(args: argparse.Namespace, files: dict[Path, Declared | None]) -> tuple[Any, TaskManager]:
    """The harness's own loop and its index of tasks; ValueError where it is not installed."""
    if not args.download:
        for library in ("HUB", "DATASETS", "EVALUATE"):
            os.environ[f"HF_{library}_OFFLINE"] = "1"
    if args.run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the harness asks for it a second time
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"evaluation takes lm-evaluation-harness ({error}); pip install 'qwen_ref[eval]' brings it"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    included = list(args.include_path or [])
    for path in included:
        if not path.is_dir():
            raise InputError(f"--include-path {path} is no folder")
    included += {file.parent for file, declared in files.items() if declared and declared[0] == "group"}
    with _of_harness("reading the tasks of", included or ["the harness"]):
        return simple_evaluate, TaskManager(include_path=included or None)


def _known(manager: TaskManager, names: list[str]) -> list[str]:
    """The names of the harness that these names or wildcards mean; ValueError where one means none."""
    known: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise InputError(
                f"the harness knows no task {name!r}{hint}; --include-path and .yaml files add tasks of "
                "your own"
            )
        known += matches
    return known


def _refuse_code(
    manager: TaskManager, known: list[str], files: dict[Path, Declared | None], asked: list[str]
) -> None:
    """ValueError where a task runs what the model writes. It comes before the data set is asked for."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with _of_harness("loading", asked):
        unsafe = set(_running_code(manager, known))
        for file in files:
            settings = load_yaml(file, resolve_func=False)
            if "group" in settings:
                unsafe.update(_running_code(manager, [settings]))
            elif settings.get("unsafe_code", False) is not False:
                unsafe.add(str(file))
    if unsafe:
        first, *more = sorted(unsafe)
        and_more = f" (and {len(more)} more)" if more else ""
        raise InputError(
            f"the task {first}{and_more} runs programs that the model writes; --run-unsafe-code allows it "
            "(do this in a container)"
        )


def _running_code(manager: TaskManager, parts: Iterable[str | dict[str, Any]]) -> Iterator[str]:
    """The tasks that run what the model writes, among tasks, groups and tags: names, or parts of a group."""
    for part in parts:
        here = part if isinstance(part, dict) else {}
        name = here.get("group", here.get("task")) if isinstance(part, dict) else part
        entry = manager.task_index.get(name)
        indexed = (entry.cfg if entry else None) or {}
        inside = next((each["task"] for each in (here, indexed) if isinstance(each.get("task"), list)), None)
        if inside is not None:
            yield from _running_code(manager, inside)
        elif entry and entry.kind.name == "TAG":
            yield from _running_code(manager, entry.tags)
        elif {**indexed, **here}.get("unsafe_code", False) is not False:
            yield str(name)


def _tasks(
    manager: TaskManager, known: list[str], files: dict[Path, Declared | None], asked: list[str]
) -> list[Any]:
    """The tasks and groups of these names of the harness and of these files, with their data sets."""
    # The harness finds the parts of a group by the group's name, not by its file.
    groups_of_files = [declared[1] for declared in files.values() if declared and declared[0] == "group"]
    with _of_harness("loading", asked):
        by_name = manager.load(list(dict.fromkeys(known + groups_of_files)))
        rest = [
            str(file)
            for file, declared in files.items()
            if declared is None or (declared[0] == "task" and declared[1] not in by_name["tasks"])
        ]
        by_file = manager.load(rest)
    groups, children = by_name["groups"], by_name["group_map"].values()
    inside = {child for names in children for child in names}
    of_groups = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    top = [group for name, group in groups.items() if name not in inside]
    alone = [task for name, task in by_name["tasks"].items() if name not in of_groups]
    return top + alone + list(by_file["tasks"].values())


@contextlib.contextmanager
def _of_harness(doing: str, tasks: Sequence[object]) -> Iterator[None]:
    """The harness's code: what it prints goes to stderr. Its errors, which are of many kinds (of task files,
    data sets and metrics), become a ValueError of one line.
    """
    from qwen_ref.parallel import RankLost

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except RankLost:
        raise
    except Exception as error:
        if out_of_memory(error) or (_is_ours(error) and not isinstance(error, InputError)):
            raise
        causes = [f"{type(error).__name__}: {error}"]
        if error.__cause__ is not None:  # such as the line of a data set that is no JSON
            causes.append(str(error.__cause__))
        message = textwrap.shorten("; ".join(cause.strip(": \n") for cause in causes), 400, placeholder=" …")
        remedy = ""
        if "offline" in message.lower() or isinstance(error, ConnectionError):
            remedy = "; fetch the data set first, or give --download"
        raise InputError(f"{doing} {', '.join(map(str, tasks))}: {message}{remedy}") from error


def _is_ours(error: Exception) -> bool:
    """Whether an error comes from this project's code, this file apart, and not from the harness."""
    ours = False
    for frame, _ in traceback.walk_tb(error.__traceback__):  # from the outermost call to the innermost
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("qwen_ref.", "lm_eval.")):
            ours = module.startswith("qwen_ref.") and module != __name__
    return ours


def _table(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(part.rstrip("\n") for part in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _evaluate, _evaluate, has_data=True), arguments)


if __name__ == "__main__":
    sys.exit(main())
