"""Check the form of a checkpoint's entries: an untrusted file may have anything under the names that are read."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any, depth: int = 10) -> bool:
    """Whether a value is data as YAML has them, in mappings with text as keys."""
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(key, str) and _is_plain(x, depth - 1) for key, x in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(x, depth - 1) for x in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_mapping(value: Any, is_valid: Callable[[Any], bool], required: Collection[str] = ()) -> bool:
    """Whether a value is a mapping of valid values, with some keys."""
    return isinstance(value, Mapping) and all(key in value for key in required) and all(map(is_valid, value.values()))


def _is_progress(value: Any) -> bool:
    return _is_mapping(value, lambda x: isinstance(x, int) and x >= 0, ('epoch', 'step', 'images', 'skipped'))


def _is_data(value: Any) -> bool:
    return _is_mapping(value, lambda split: _is_mapping(split, _is_plain, ('images', 'sha256')))


def _is_file(value: Any) -> bool:
    return isinstance(value.get('path'), str) and isinstance(value.get('sha256'), str)


def _is_origin(value: Any) -> bool:
    if not (_is_plain(value) and isinstance(value, Mapping) and isinstance(value.get('kind'), str)):
        return False
    nested, teacher = value.get('origin'), value.get('teacher')
    if not (teacher is None or _is_mapping(teacher, lambda x: isinstance(x, str), ('name', 'sha256'))):
        return False
    return (value['kind'] == 'scratch' or _is_file(value)) and (nested is None or _is_origin(nested))


# Forms of the entries that are read, except for the training state's, which `TrainingState` checks
_FORMS: dict[str, Callable[[Any], bool]] = {
    'config': lambda value: isinstance(value, Mapping) and _is_plain(value),
    'classes': lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
    'scores': lambda value: _is_mapping(value, _is_number),
    'max_accuracy': _is_number,
    'epoch': lambda value: isinstance(value, int) and value >= -1,
    'progress': _is_progress,
    'place': _is_progress,
    'data': _is_data,
    'environment': lambda value: _is_mapping(value, lambda x: isinstance(x, str)),
    'origin': _is_origin,
    'pretrained': lambda value: isinstance(value, Mapping) and _is_plain(value) and _is_file(value),
}


def without_other_forms(entries: dict[str, Any]) -> dict[str, Any]:
    """Leave out the entries whose form is not the one in `_FORMS`; see `load_checkpoint`."""
    kept, ignored = {}, []
    for name, value in entries.items():
        is_valid = _FORMS.get(name) if isinstance(name, str) else None
        if is_valid and isinstance(value, Tensor) and value.ndim == 0 and value.device.type == 'cpu':
            value = value.item()
        if is_valid is None or is_valid(value) or (value is None and name in ('origin', 'pretrained')):
            kept[name] = value
        elif value is not None:
            ignored.append(f'{name} ({type(value).__name__})')
    kept.pop('ignored', None)
    return kept | ({'ignored': ignored} if ignored else {})
