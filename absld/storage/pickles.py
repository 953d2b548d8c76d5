"""A look at the pickles of a weight file before torch reads them.

torch.load(weights_only=True) runs no code, but a small file can keep it busy for ever or fill the
memory: by tuples of tuples, which are hashed or printed, by a bytearray of any size, by a codec.
Here the operations of a pickle are followed without building anything; what passes is small.
"""

import io
import pickletools
import re
from typing import Any

MOST_PARTS = 500_000  # of a content written out in full; a thousand tensors with Adam: 150,000
# What weights, optimisers, schedules and numpy's values are made of. All are in torch's own list or
# in `NUMPY` of absld.storage.checkpoint.
NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) (set|complex)|_codecs encode"
    r"|torch(\.storage)? \w+|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor(_v[23])?|parameter)"
    r"|torch\._utils _rebuild_device_tensor_from_(numpy|cpu_tensor)"
    r"|numpy (dtype|ndarray)|numpy\._?core\.multiarray (scalar|_reconstruct)"
)
GROWING = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"))
# By operation: how many values it takes from the stack; MARKED: one and all since the last mark.
MARKED = -1
TAKES = {
    operation.name: MARKED
    if pickletools.markobject in operation.stack_before
    else len(operation.stack_before)
    for operation in pickletools.opcodes
}


class RefusedContentError(ValueError):
    """A file that would build objects of other kinds, or too many, or too large ones."""


class Part:
    """A value that an operation makes.

    Attributes:
        size: the number of values in it, written out in full.
        value: a text or number itself; for a tuple or a call the values of its parts; else a name.
        fetched: whether it is part of something, in which it counts by its size so far.
    """

    __slots__ = ("fetched", "size", "value")

    def __init__(self, size: int, value: Any) -> None:
        self.size, self.value, self.fetched = size, value, False


def check_pickle(file: io.BytesIO) -> None:
    """Read one pickle from a file. Raises RefusedContentError, and others for damaged bytes."""
    stack: list[Part] = []
    marks: list[int] = []
    memo: dict[Any, Part] = {}
    total = 0
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        total += 1
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            part = memo[argument]
            part.fetched = True
            total += part.size
            stack.append(part)
        elif name == "MARK":
            marks.append(len(stack))
        elif count := TAKES[name]:
            at = marks.pop() - (name != "TUPLE") if count == MARKED else len(stack) - count
            taken = stack[at:]
            del stack[at:]
            if name != "STOP":
                stack.append(combine(name, taken))
        else:
            if name == "GLOBAL":
                check_name(str(argument))
            if name == "PROTO" and argument not in (2, 3):
                raise RefusedContentError(f"pickled by protocol {argument}, read is 2")
            stack.append(Part(1, name if argument is None else argument))
        if total > MOST_PARTS:
            raise RefusedContentError(f"holds more than {MOST_PARTS:,} values")


def combine(name: str, taken: list[Part]) -> Part:
    """Return what an operation makes of parts. Raises RefusedContentError."""
    added = sum([part.size for part in taken])
    if name in GROWING:
        whole = taken[0]
        if whole.fetched:
            raise RefusedContentError("holds itself")
        if name in ("SETITEM", "SETITEMS"):
            check_keys(taken[1::2])
        whole.size = added
        return whole
    values = tuple([part.value for part in taken])
    check_call(name, values)
    return Part(1 + added, values)


def check_name(name: str) -> None:
    """Raise RefusedContentError for a name (module and object) that weights do not need."""
    if not NAMES.fullmatch(name):
        wanted = name.replace(" ", ".")
        raise RefusedContentError(f"refused, it would run code or build objects ({wanted})")


def check_keys(keys: list[Part]) -> None:
    """Raise RefusedContentError unless keys are texts or ordinary numbers, of different hashes."""
    for key in keys:
        value = key.value
        if isinstance(value, tuple) or (isinstance(value, int) and value.bit_length() > 63):
            raise RefusedContentError("holds a dict whose keys are not texts or numbers")


def check_call(name: str, values: tuple[Any, ...]) -> None:
    """Raise RefusedContentError for arguments that files by torch.save do not have."""
    if name == "REDUCE":
        function, arguments = values
        if function == "_codecs encode" and arguments[1:] != ("latin1",):
            raise RefusedContentError("refused, it would run a codec")
        if str(function).endswith(" _reconstruct") and arguments[1:2] != ((0,),):
            raise RefusedContentError("holds an array without values")
    # torch numbers the storages. Other keys may be several names of one record.
    elif name == "BINPERSID" and not re.fullmatch(r"[0-9]+", str(values[0][2])):
        raise RefusedContentError("holds a storage without a number")
