"""The tasks, for tools that work for each of them."""

import detection.main
import main
from engine.config_tree import ConfigError, task_of_file
from engine.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (main.TASK, detection.main.TASK)}


def find_task(cfg_file: str) -> Task:
    """The task of a config file.

    Raises:
        ConfigError: the file cannot be read, or states another task.
    """
    name = task_of_file(cfg_file)
    if name not in TASKS:
        raise ConfigError(f'TASK is {name!r} in {cfg_file}: write one of {", ".join(TASKS)}')
    return TASKS[name]
