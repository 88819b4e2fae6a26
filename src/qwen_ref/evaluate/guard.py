"""What a task of the harness may run and read: no metric unasked, no data of the folder it happens to run in.

The libraries `evaluate` and `datasets` take a folder of the working directory for a metric or a data set of
its name. A metric is a program, which is run as it is loaded.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ref.config import InputError


class _Refused(BaseException):
    """No Exception: the harness goes on without a metric whose loading raises one."""


@contextlib.contextmanager
def guarded(run_unsafe_code: bool) -> Iterator[None]:
    """Within it tasks load no metric of the `evaluate` library unless asked to, and no folder in its place.

    The harness's own tasks read no folder of the working directory in place of a data set. Task files of the
    user's may. Their data files are also looked for beside the task file and in the folders above it.
    ValueError names what was refused.
    """
    import datasets.load
    import evaluate.loading
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    any_metric, local_metric = (
        evaluate.loading.evaluation_module_factory,
        evaluate.loading.LocalEvaluationModuleFactory,
    )
    local_data, data_files = (
        datasets.load.LocalDatasetModuleFactory,
        datasets.load.PackagedDatasetModuleFactory,
    )
    download = ConfigurableTask.download
    task_file: Path | None = None  # the user's task file whose data set is being loaded

    def load_metric(path: str, *args: Any, **how: Any) -> Any:
        if not run_unsafe_code:
            raise _Refused(
                f"the metric {path!r} is a program of the evaluate library, which is run as it is loaded; "
                "--run-unsafe-code allows it (do this in a container)"
            )
        try:
            return any_metric(path, *args, **how)
        except (ConnectionError, FileNotFoundError) as error:
            raise _Refused(
                f"the metric {path!r} of the evaluate library is not on this machine; fetch it first, or "
                "give --download"
            ) from error

    def load_local_metric(path: str, *args: Any, **how: Any) -> Any:
        if not _is_explicit(path):
            raise _Refused(
                f"the file {path} of the working directory would be run as a metric of the evaluate library; "
                f"start in another folder, or write ./{path} in your task file"
            )
        return local_metric(path, *args, **how)

    def load_local_data(path: str, *args: Any, **how: Any) -> Any:
        if task_file is None and not _is_explicit(path):
            raise _Refused(
                f"the folder {path} of the working directory would be read in place of the data set {path}; "
                f"start in another folder, or write ./{path} in a task of your own"
            )
        return local_data(path, *args, **how)

    def load_data_files(*args: Any, **how: Any) -> Any:
        if task_file is not None and not how.get("data_dir"):
            how["data_files"] = _found(how.get("data_files"), task_file)
        return data_files(*args, **how)

    def load_data_of_task(task: ConfigurableTask, *args: Any, **how: Any) -> None:
        nonlocal task_file
        source = Path((task.config.metadata or {}).get("config_source", "inline"))
        own = Path(lm_eval.tasks.__file__).parent
        task_file = source if source.is_file() and own not in source.parents else None
        try:
            download(task, *args, **how)
        finally:
            task_file = None

    with contextlib.ExitStack() as undo:
        for owner, name, guard in (
            (evaluate.loading, "evaluation_module_factory", load_metric),
            (evaluate.loading, "LocalEvaluationModuleFactory", load_local_metric),
            (datasets.load, "LocalDatasetModuleFactory", load_local_data),
            (datasets.load, "PackagedDatasetModuleFactory", load_data_files),
            (ConfigurableTask, "download", load_data_of_task),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, guard)
        try:
            yield
        except _Refused as refused:
            raise InputError(str(refused)) from refused


def _is_explicit(path: str) -> bool:
    """Whether a path can be no name of a metric or a data set."""
    return os.path.isabs(path) or path.startswith(".")


def _found(files: Any, task_file: Path) -> Any:
    """Data files (a pattern, a list, or one of these for each split), each as it is in the working directory,
    or as a path from the first folder above the task file that has it.
    """
    if isinstance(files, dict):
        return {split: _found(part, task_file) for split, part in files.items()}
    if isinstance(files, list):
        return [_found(part, task_file) if isinstance(part, str) else part for part in files]
    if not isinstance(files, str) or "://" in files or glob.glob(files, recursive=True):
        return files
    paths = (os.path.join(glob.escape(str(folder)), files) for folder in task_file.absolute().parents)
    return next((path for path in paths if glob.glob(path, recursive=True)), files)
