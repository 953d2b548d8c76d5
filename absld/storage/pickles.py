"""A look at the pickles of a weight file before torch reads them.

torch.load(weights_only=True) runs no code, but a small file can keep it busy for ever or fill the
memory: by tuples of tuples, which are hashed or printed, by a bytearray of any size, by a codec.
Here the operations of a pickle are followed without building anything; what passes is small.
"""

import functools
import io
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from absld.text import clip

MOST_PARTS = 500_000  # of a content written out in full; a thousand tensors with Adam: 150,000
MOST_DEPTH = 100  # of values in values; that of a training with Adam and schedulers is 8
LETTERS = 32  # of a text that count as a value: it may be copied as often as it is named
# All operations that torch.save writes. Others are not followed, and torch.load knows few of them.
OPERATIONS = frozenset((
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST",
    "EMPTY_DICT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID",
    "REDUCE", "BUILD",
))  # fmt: skip
# Those of a list of texts: in the old format, the storages whose bytes follow.
OF_A_LIST = frozenset((
    "PROTO", "EMPTY_LIST", "MARK", "BINUNICODE", "BINPUT", "LONG_BINPUT", "APPEND", "APPENDS", "STOP",
))  # fmt: skip
GROWING = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"))
CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_LIST": [],
    "EMPTY_DICT": {},
}
# By operation: how many values it takes from the stack; MARKED: one and all since the last mark.
MARKED = -1
TAKES = {
    operation.name: MARKED
    if pickletools.markobject in operation.stack_before
    else len(operation.stack_before)
    for operation in pickletools.opcodes
    if operation.name in OPERATIONS
}


class Call(NamedTuple):
    """An object that a pickle makes: the name of a callable, and its arguments."""

    function: Any
    arguments: Any


# --- What a pickle may call: all that weights, optimisers, schedules and numpy's values need ---

NUMBER = re.compile("[0-9]+")
TYPES = re.compile(r"torch(\.storage)? \w+|numpy ndarray")  # may be named, not called
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9][0-9]{0,3})")


def is_dtype(value: Any) -> bool:
    return isinstance(value, Call) and value.function == "numpy dtype"


# By callable: whether its arguments are those that torch.save writes. torch checks a tensor's.
ARGUMENTS: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "torch._utils _rebuild_tensor": lambda given: len(given) == 4,
    "torch._utils _rebuild_tensor_v2": lambda given: len(given) in (6, 7),
    "torch._utils _rebuild_tensor_v3": lambda given: len(given) in (7, 8),
    "torch._utils _rebuild_parameter": lambda given: len(given) == 3,
    "torch device": lambda given: len(given) in (1, 2),
    "torch Size": lambda given: len(given) == 1 and type(given[0]) is tuple,  # not of a Call
    "collections OrderedDict": lambda given: given == (),
    "collections Counter": lambda given: given == ({},),  # its keys are checked as they are set
    "_codecs encode": lambda given: given[1:] == ("latin1",),
    # The last argument asks for a copy: numpy's own type of numbers must not be changed.
    "numpy dtype": lambda given: (
        bool(DTYPE.fullmatch(str(given[0]))) and given[1:] == (False, True)
    ),
    **dict.fromkeys(("builtins complex", "__builtin__ complex"), lambda given: len(given) == 2),
}
# By callable: whether the state of what it returned is one that torch.save writes.
STATES: dict[str, Callable[[Call, Any], bool]] = {
    "collections OrderedDict": lambda made, state: state == {},  # of attributes
    "numpy dtype": lambda made, state: is_state_of(str(made.arguments[0]), state),
}
ONE_BYTE = Call("_codecs encode", ("b", "latin1"))
for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
    ARGUMENTS |= {
        f"{core} scalar": lambda given: len(given) == 2 and is_dtype(given[0]),
        f"{core} _reconstruct": lambda given: given == ("numpy ndarray", (0,), ONE_BYTE),
    }
    STATES |= {
        f"{core} _reconstruct": lambda made, state: len(state) == 5 and is_dtype(state[2]),
    }


@functools.lru_cache(100)
def numpy_state(name: str) -> tuple[Any, ...]:
    return tuple(np.dtype(name).__reduce__()[2])


def is_state_of(name: str, state: Any) -> bool:
    """Return whether numpy itself gives a dtype this state, but for the order of its bytes."""
    own = numpy_state(name)
    return state in [(own[0], order, *own[2:]) for order in "<>|="]


class RefusedContentError(ValueError):
    """A file that would build objects of other kinds, or too many, or too large ones."""


class Part:
    """A value that an operation makes.

    Attributes:
        size: the number of values in it, written out in full.
        value: a text or number itself; a list or dict as it was made, empty; a tuple of the values
            of its parts; a Call; or the name of something else.
        depth: how many values it is in values: hashing a deep tuple would overflow the stack.
        fetched: whether it is part of something, in which it counts by its size so far.
    """

    __slots__ = ("depth", "fetched", "size", "value")

    def __init__(self, size: int, value: Any, depth: int = 0) -> None:
        self.size, self.value, self.depth, self.fetched = size, value, depth, False


class Seen(NamedTuple):
    """The texts and the numbers of storages in a pickle."""

    texts: set[str]
    storages: set[str]


def check_pickle(file: io.BytesIO, operations: frozenset[str] = OPERATIONS) -> Seen:
    """Read one pickle from a file, of these operations.

    Raises RefusedContentError, and others for damaged bytes.
    """
    seen = Seen(set(), set())
    stack: list[Part] = []
    marks: list[int] = []
    memo: dict[Any, Part] = {}
    total = 0
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name not in operations:
            raise RefusedContentError(f"uses {name}, which torch.save does not write by protocol 2")
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
            if name == "BINPERSID":
                seen.storages.add(check_storage(taken[0].value))
            if name != "STOP":
                stack.append(combine(name, taken))
            elif stack:
                raise RefusedContentError("holds values that are not read")
        elif name == "PROTO":
            if argument not in (2, 3):
                raise RefusedContentError(
                    f"pickled with protocol {argument}; only protocol 2 is read"
                )
        else:
            if name == "GLOBAL":
                check_name(str(argument))
            size = 1
            if isinstance(argument, str):
                seen.texts.add(argument)
                size += len(argument) // LETTERS
            stack.append(Part(size, CONSTANTS.get(name, argument)))
        if total > MOST_PARTS:
            raise RefusedContentError(f"holds more than {MOST_PARTS:,} values")
    return seen


def combine(name: str, taken: list[Part]) -> Part:
    """Return what an operation makes of parts. Raises RefusedContentError."""
    added = sum([part.size for part in taken])
    depth = 1 + max([part.depth for part in taken], default=0)
    if depth > MOST_DEPTH:
        raise RefusedContentError(f"holds values in values, more than {MOST_DEPTH} deep")
    if name in GROWING:
        whole = taken[0]
        check_growth(name, whole, taken)
        whole.size, whole.depth = added, depth
        return whole
    values = tuple([part.value for part in taken])
    if name == "REDUCE":
        check_call(*values)
        return Part(1 + added, Call(*values), depth)
    if name == "BINPERSID":
        return Part(1 + added, Call("storage", values[0]), depth)
    return Part(1 + added, values, depth)


def check_storage(given: Any) -> str:
    """Return the number of a storage. Raises RefusedContentError if it is not a whole one."""
    # Other keys may be several names of one record. torch frees a storage of which others are views.
    if type(given) is not tuple or not NUMBER.fullmatch(str(given[2])):
        raise RefusedContentError("holds a storage without a number")
    if given[5:] not in ((), (None,)):
        raise RefusedContentError("holds a storage that is a part of another")
    return str(given[2])


def check_name(name: str) -> None:
    """Raise RefusedContentError for a name (module and object) that weights do not need."""
    if name not in ARGUMENTS and not TYPES.fullmatch(name):
        raise RefusedContentError(f"refused, it would run code or build objects ({spelt(name)})")


def check_call(function: Any, arguments: Any) -> None:
    """Raise RefusedContentError for a call that files by torch.save do not have."""
    rule = ARGUMENTS.get(function) if isinstance(function, str) else None
    # A Call is a tuple too, but what it returns may hold anything.
    if rule is None or type(arguments) is not tuple or not rule(arguments):
        raise RefusedContentError(f"refused, weights do not call {spelt(function)} like this")


def check_growth(name: str, whole: Part, taken: list[Part]) -> None:
    """Raise RefusedContentError for items or a state that files by torch.save do not have."""
    if whole.fetched:
        raise RefusedContentError("holds itself")
    made = whole.value
    function = made.function if isinstance(made, Call) else None
    if name == "BUILD":
        rule = STATES.get(function) if isinstance(function, str) else None
        if rule is None or not rule(made, taken[1].value):
            raise RefusedContentError(f"refused, it would change {spelt(function)}")
    elif name.startswith("APPEND"):
        if made != []:
            raise RefusedContentError("appends to what is not a list")
    else:
        if made != {} and function != "collections OrderedDict":
            raise RefusedContentError("sets an item of what is not a dict")
        check_keys(taken[1::2])


def spelt(function: Any) -> str:
    """Return the dotted name of a callable."""
    return clip(function.replace(" ", "."), 80) if isinstance(function, str) else "another object"


def check_keys(keys: list[Part]) -> None:
    """Raise RefusedContentError unless keys are texts or ordinary numbers, of different hashes."""
    for key in keys:
        value = key.value
        if isinstance(value, tuple) or (isinstance(value, int) and value.bit_length() > 63):
            raise RefusedContentError("holds a dict whose keys are not texts or numbers")
