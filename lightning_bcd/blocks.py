"""Blocks: which parameters of a model are trained together.

Discovery works on the trainable parameters in registration order (`model.named_parameters()`, which names a
tied parameter once, at its first occurrence): choose the modules that become blocks, give each parameter to the
chosen module around it, and let what is left over (norms, stray parameters) join the block before it.
"""

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

_BLOCK_TYPES = ("auto", "transformer", "layer", "linear", "child")


class LayerBlock:
    """A named group of parameters that is trained as one block.

    Args:
        name: Name used in tables and logged metrics, unique within a partition.
        parameters: The parameters of the block, each once; the attribute `parameters` is a list of them.

    Raises:
        ValueError: If there is no parameter, or one is given twice.
        TypeError: If an element is not an `nn.Parameter`.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter]) -> None:
        self.name = name
        self.parameters: list[nn.Parameter] = list(parameters)
        others = {type(p).__name__ for p in self.parameters if not isinstance(p, nn.Parameter)}
        if others:
            raise TypeError(_message("parameters", f"nn.Parameters ({name})", others, "pass `module.parameters()`"))
        count, distinct = len(self.parameters), len({id(p) for p in self.parameters})
        if count == 0:
            raise ValueError(_message("parameters", f"non-empty ({name})", "none", "leave out empty blocks"))
        if distinct < count:
            got = f"{count} of which {distinct} are distinct"
            raise ValueError(_message("parameters", f"distinct ({name})", got, "give a tied one once"))
        self._requires_grad = [p.requires_grad for p in self.parameters]

    def freeze(self) -> None:
        """Set `requires_grad` to False on every parameter."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def unfreeze(self) -> None:
        """Give every parameter the `requires_grad` it had when the block was made.

        A parameter that the user had frozen by then stays frozen.
        """
        for parameter, requires_grad in zip(self.parameters, self._requires_grad, strict=True):
            parameter.requires_grad_(requires_grad)

    def num_parameters(self) -> int:
        """Return the number of elements of all parameters together."""
        return sum(p.numel() for p in self.parameters)

    def __repr__(self) -> str:
        elements = "uninitialised" if any(map(is_lazy, self.parameters)) else f"{self.num_parameters():,} elements"
        return f"LayerBlock({self.name!r}, {elements}, {len(self.parameters)} parameters)"


BlockSpec: TypeAlias = str | Mapping[str, str] | Sequence[LayerBlock] | Callable[[nn.Module], Sequence[LayerBlock]]
_Named: TypeAlias = dict[str, nn.Parameter]


def create_blocks_from_model(
    model: nn.Module,
    block_type: BlockSpec = "auto",
    *,
    num_blocks: int | None = None,
    max_parameters: int | None = None,
) -> list[LayerBlock]:
    """Partition the trainable parameters of a model into blocks.

    Each parameter with `requires_grad=True` ends up in exactly one block; parameters that the user froze stay
    out. A tied parameter counts once, at its first occurrence in `model.named_parameters()`. Blocks come in
    registration order; a mapping or list keeps its own order.

    Args:
        model: The model, without lazy parameters; it is not modified.
        block_type: One of

            - `"transformer"`: one block per layer of each repeated layer list, that is each `nn.ModuleList` or
              `nn.Sequential` of which at least two children hold trainable parameters, all of one class that
              has submodules with parameters. Of nested lists the outermost counts; several lists (encoder and
              decoder, the stages of a ResNet) all count. Parameters before the first list form the block
              `"embeddings"`, those after the last `"head"`, those in between join the layer before.
            - `"layer"`: one block per module that holds parameters and has no child that does, norms excepted.
            - `"linear"`: one block per `nn.Linear`.
            - `"child"`: one block per child of the outermost module of which more than one child holds
              trainable parameters, so a wrapper around a single network does not count.
            - `"auto"`: `"transformer"` if there is such a list, else `"layer"`.
            - a mapping from block name to regular expression, searched (`re.search`) in the parameter's name.
            - a list of `LayerBlock`, checked; one that holds frozen parameters is replaced by one without them.
            - a callable that takes the model and returns such a list.

            Except in the last two, parameters that no block claims join the block before them in registration
            order, or the first block that follows if there is none before.
        num_blocks: Merge neighbours into exactly this many groups, the largest group as small as possible. A
            group is named `first..last`.
        max_parameters: Split blocks with more elements than this into child modules, recursively, and a leaf
            module into its parameters; neighbouring pieces of a block are packed together up to the limit. A
            parameter above the limit is a block of its own. With `num_blocks` too, blocks are split first, so
            there are finer pieces to merge; `num_blocks` has the last word, a merged group may exceed the limit.

    Returns:
        The blocks.

    Raises:
        ValueError: If `block_type` is an unknown string or an invalid pattern, a size is not a positive
            integer, no parameter is trainable, one is lazy, or `num_blocks` is more than there are. With the
            coverage table: if discovery (string, callable) ends with one block, a pattern matches nothing,
            or blocks overlap, miss a parameter, hold only frozen ones or ones that are not in the model.
        TypeError: If `block_type` is none of the above or does not consist of `LayerBlock` objects.

    Warns:
        UserWarning: If an explicit request (list, mapping, `num_blocks=1`) makes one block of everything.
    """
    for argument, value in (("num_blocks", num_blocks), ("max_parameters", max_parameters)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(_message(argument, "a positive integer or None", repr(value), "pass 1 or more"))
    named = _trainable(model)
    if isinstance(block_type, str):
        blocks = _discover(model, block_type, named)
    elif isinstance(block_type, Mapping):
        blocks = _match(block_type, named)
    else:
        blocks = _validate(block_type(model) if callable(block_type) else block_type, model, named)
    if max_parameters is not None:
        blocks = [part for block in blocks for part in _split(block, named, max_parameters)]
    if num_blocks is not None:
        blocks = _merge(blocks, num_blocks)
    if len(blocks) == 1:
        if (isinstance(block_type, str) or callable(block_type)) and num_blocks is None:
            remedy = "choose a finer one, set `max_parameters`, or pass a list with this block"
            raise _error("a partition into several blocks", "one block of everything", remedy, blocks, named)
        message = f"The only block {blocks[0].name!r} holds all trainable parameters: this is ordinary training."
        warnings.warn(message, UserWarning, stacklevel=2)
    return blocks


def describe_blocks(blocks: Sequence[LayerBlock], *, states_per_parameter: int = 2) -> str:
    """Return a table of the blocks and of the memory that each needs while it is the active one.

    A block needs Σ numel · itemsize · (1 + states_per_parameter) bytes: its gradient and its optimizer state,
    both in the parameter's dtype. Weights and activations are not counted.

    Args:
        blocks: The blocks to list, at least one.
        states_per_parameter: Tensors the optimizer keeps per parameter: Adam 2, SGD with momentum 1, plain SGD 0.

    Returns:
        Aligned plain text, a header, one line per block, and a last line with the totals, the bytes of the
        largest block and their ratio to the bytes of all blocks.

    Raises:
        ValueError: If there is no block, or `states_per_parameter` is negative.
    """
    if not blocks:
        raise ValueError(_message("blocks", "at least one block", "none", "pass the list of blocks"))
    if states_per_parameter < 0:
        raise ValueError(_message("states_per_parameter", "0 or more", states_per_parameter, "pass 2 for Adam"))
    sizes = [block.num_parameters() for block in blocks]
    tensors = 1 + states_per_parameter
    costs = [tensors * sum(p.numel() * p.element_size() for p in block.parameters) for block in blocks]
    total, cost = sum(sizes), sum(costs)
    rows = [("index", "name", "parameters", "share", "gradient + optimizer")]
    for i, block in enumerate(blocks):
        share = f"{100 * sizes[i] / max(total, 1):.1f} %"
        rows.append((str(i), block.name, f"{sizes[i]:,}", share, readable_bytes(costs[i])))
    rows.append(("total", f"blocks: {len(blocks)}", f"{total:,}", "100.0 %", readable_bytes(cost)))
    a, b, c, d, e = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{i:>{a}}  {name:<{b}}  {n:>{c}}  {share:>{d}}  {size:>{e}}" for i, name, n, share, size in rows]
    largest = f"largest block: {readable_bytes(max(costs))} = {100 * max(costs) / max(cost, 1):.1f} % of all"
    return "\n".join(lines) + f"; {largest}"


def readable_bytes(count: int) -> str:
    """Return bytes with a unit, e.g. 1.5 KiB."""
    exponent = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count} B" if exponent == 0 else f"{count / 1024**exponent:.1f} {'KMGT'[exponent - 1]}iB"


def _message(argument: str, wanted: str, got: object, remedy: str) -> str:
    return f"Expected argument `{argument}` to be {wanted}, but got {got}. Do {remedy}."


def _error(wanted: str, got: str, remedy: str, blocks: Sequence[LayerBlock], named: _Named) -> ValueError:
    """Make the error that ends with the coverage table: the blocks and what is in none of them."""
    covered = {id(p) for block in blocks for p in block.parameters}
    missing = [p for p in named.values() if id(p) not in covered]
    table = describe_blocks([*blocks, LayerBlock("(in no block)", missing)] if missing else blocks)
    return ValueError(f"{_message('block_type', wanted, got, remedy)}\n{table}")


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _trainable(model: nn.Module) -> _Named:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(_message("model", "trainable", "only frozen parameters or none", "unfreeze what to train"))
    lazy = [name for name, p in named.items() if is_lazy(p)]
    if lazy:
        raise ValueError(_message("model", "without lazy parameters", _listed(lazy), "run one batch through it first"))
    return named


def _around(name: str) -> list[str]:
    """Return the paths of the modules around a parameter or module, innermost first, the root ("") last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _discover(model: nn.Module, block_type: str, named: _Named) -> list[LayerBlock]:
    if block_type not in _BLOCK_TYPES:
        remedy = "choose one, or pass a mapping, a list of LayerBlock or a callable"
        raise ValueError(_message("block_type", f"one of {_BLOCK_TYPES}", repr(block_type), remedy))
    # A module that is registered twice (a tied embedding) holds its parameters only at its first path.
    holders = {path for name in named for path in _around(name)}
    modules = {path: module for path, module in model.named_modules() if path in holders}
    children: dict[str, list[str]] = {path: [] for path in modules}
    for path in modules:
        if path:
            children[_around(path)[0]].append(path)

    def choose(kind: str, path: str) -> list[str]:
        module, inner = modules[path], children[path]
        if kind == "child":
            return inner if len(inner) > 1 else []
        if kind == "transformer":
            is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(inner) > 1
            repeated = len({type(modules[child]) for child in inner}) == 1
            return inner if is_list and repeated and any(children[child] for child in inner) else []
        return [path] if (isinstance(module, nn.Linear) if kind == "linear" else _is_layer(module, inner)) else []

    for kind in ("transformer", "layer") if block_type == "auto" else (block_type,):
        chosen: set[str] = set()
        for path in modules:  # parents come first, so this never looks inside a chosen module
            if chosen.isdisjoint((path, *_around(path))):
                chosen.update(choose(kind, path))
        if chosen:
            owners = [next((path for path in _around(name) if path in chosen), None) for name in named]
            if kind == "transformer":
                claimed = [i for i, owner in enumerate(owners) if owner is not None]
                owners[: claimed[0]] = ["embeddings"] * claimed[0]
                owners[claimed[-1] + 1 :] = ["head"] * (len(owners) - claimed[-1] - 1)
            return _collect(owners, named)
    got = f"{block_type!r}, for which the model has no module"
    raise _error("a way to find blocks", got, "choose another one ('layer' fits most models)", [], named)


def _is_layer(module: nn.Module, children: list[str]) -> bool:
    # A parametrised module (weight norm, orthogonal, ...) keeps its weights in submodules but is one layer.
    if children and not is_parametrized(module):
        return False
    # Many libraries write their own norms (LlamaRMSNorm, LayerNorm2d), which only their names give away.
    norms = nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm
    return not isinstance(module, norms) and not re.search(r"(?i)norm(\dd)?$", type(module).__name__)


def _collect(owners: Sequence[str | None], named: _Named, order: Iterable[str] = ()) -> list[LayerBlock]:
    """Make one block per owner; a parameter without owner joins the one before, or the first that follows."""
    members: dict[str, list[nn.Parameter]] = {owner: [] for owner in order}
    current = next(owner for owner in owners if owner is not None)
    for owner, parameter in zip(owners, named.values(), strict=True):
        current = current if owner is None else owner
        members.setdefault(current, []).append(parameter)
    return [LayerBlock(owner or "model", parameters) for owner, parameters in members.items()]


def _match(patterns: Mapping[str, str], named: _Named) -> list[LayerBlock]:
    matches: dict[str, list[str]] = {}
    for block, pattern in patterns.items():
        try:
            matches[block] = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            got = f"{pattern!r} for {block!r}: {error}"
            remedy = "escape special characters, for example with `re.escape`"
            raise ValueError(_message("block_type", "regular expressions", got, remedy)) from error
    members = [(block, [named[name] for name in names]) for block, names in matches.items()]
    _check(members, named, leftovers=True)
    owner_of = {name: block for block, names in matches.items() for name in names}
    return _collect([owner_of.get(name) for name in named], named, order=patterns)


def _validate(blocks: object, model: nn.Module, named: _Named) -> list[LayerBlock]:
    if not isinstance(blocks, Sequence) or not all(isinstance(block, LayerBlock) for block in blocks):
        wanted = "a string, a mapping from name to pattern, a list of LayerBlock or a callable that returns one"
        remedy = "make each block with `LayerBlock(name, parameters)` and put even a single one in a list"
        raise TypeError(_message("block_type", wanted, repr(blocks), remedy))
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    members = [(block.name, [p for p in block.parameters if id(p) not in frozen]) for block in blocks]
    _check(members, named, leftovers=False)
    # A block made while its parameters were frozen would freeze them again in `unfreeze`: make it anew too.
    return [
        block if all(block._requires_grad) and len(kept) == len(block.parameters) else LayerBlock(name, kept)
        for block, (name, kept) in zip(blocks, members, strict=True)
    ]


def _check(members: Sequence[tuple[str, list[nn.Parameter]]], named: _Named, *, leftovers: bool) -> None:
    """Raise unless every trainable parameter is in one block (or in none, with `leftovers`)."""
    holders: dict[int, list[str]] = {id(p): [] for p in named.values()}
    foreign: list[str] = []
    for block, parameters in members:
        for parameter in parameters:
            holders.get(id(parameter), foreign).append(block)
    names = [block for block, _ in members]
    problems = {
        "no trainable parameter for": [block for block, parameters in members if not parameters],
        "parameters of another model in": list(dict.fromkeys(foreign)),
        "an overlap:": [f"{n} in {' and '.join(holders[id(p)])}" for n, p in named.items() if len(holders[id(p)]) > 1],
        "several blocks with the name": sorted({name for name in names if names.count(name) > 1}),
        "in no block:": [] if leftovers and members else [n for n, p in named.items() if not holders[id(p)]],
    }
    got = " and ".join(f"{problem} {_listed(found)}" for problem, found in problems.items() if found)
    if got:
        wanted = "blocks that hold every trainable parameter of the model exactly once"
        remedy = "compare with `model.named_parameters()`, which names a tied parameter once"
        blocks = [LayerBlock(block, parameters) for block, parameters in members if parameters]
        raise _error(wanted, got, remedy, blocks, named)


def _split(block: LayerBlock, named: _Named, limit: int) -> list[LayerBlock]:
    """Split a block above the limit into modules or parameters, then pack neighbours up to the limit."""
    if block.num_parameters() <= limit or len(block.parameters) == 1:
        return [block]
    members = {id(p) for p in block.parameters}
    packs: list[list[list[str]]] = []
    room = -1
    for piece in _pieces([name for name, p in named.items() if id(p) in members], named, limit):
        size = sum(named[name].numel() for name in piece)
        if size > room:
            packs.append([])
            room = limit
        packs[-1].append(piece)
        room -= size
    spans = [_span(_title(pack[0], named), _title(pack[-1], named)) for pack in packs]
    return [LayerBlock(s, [named[n] for piece in pack for n in piece]) for s, pack in zip(spans, packs, strict=True)]


def _pieces(names: list[str], named: _Named, limit: int, depth: int = 1) -> list[list[str]]:
    if len(names) == 1 or sum(named[name].numel() for name in names) <= limit:
        return [names]
    groups = groupby(names, key=lambda name: name.split(".")[:depth])
    return [piece for _, group in groups for piece in _pieces(list(group), named, limit, depth + 1)]


def _title(piece: list[str], named: _Named) -> str:
    """Name a piece after the module that it is all of, else after its parameters: names stay unique."""
    module = next(path for path in _around(piece[0]) if all(path in _around(name) for name in piece))
    whole = module and sum(module in _around(name) for name in named) == len(piece)
    return module if whole else _span(piece[0], piece[-1])


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first.split('..')[0]}..{last.split('..')[-1]}"


def _merge(blocks: Sequence[LayerBlock], num_blocks: int) -> list[LayerBlock]:
    """Merge neighbours: the largest group as small as possible, then the sum of squares, which evens them out."""
    sizes = [block.num_parameters() for block in blocks]
    ends = [0, *accumulate(sizes)]
    if num_blocks > len(blocks):
        remedy = "lower it, choose a finer `block_type`, or set `max_parameters` to split blocks"
        raise ValueError(_message("num_blocks", f"at most {len(blocks)}, the blocks found", num_blocks, remedy))

    def groups_needed(limit: int) -> int:
        groups, room = 0, -1
        for size in sizes:
            groups, room = (groups, room - size) if size <= room else (groups + 1, limit - size)
        return groups

    # The smallest limit that num_blocks groups can keep, by bisection; fewer groups can always be cut further.
    limit = bisect_left(range(ends[-1]), -num_blocks, lo=max(sizes), key=lambda limit: -groups_needed(limit))
    # best[end]: the smallest sum of squares of the first `end` blocks in so many groups, and the cuts.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(num_blocks):
        longer: dict[int, tuple[int, list[int]]] = {}
        for end in range(1, len(ends)):
            starts = [s for s in range(bisect_left(ends, ends[end] - limit), end) if s in best]
            if starts:
                squares, start = min((best[s][0] + (ends[end] - ends[s]) ** 2, s) for s in starts)
                longer[end] = (squares, [*best[start][1], end])
        best = longer
    groups = [blocks[start:end] for start, end in pairwise(best[len(blocks)][1])]
    return [
        g[0] if len(g) == 1 else LayerBlock(_span(g[0].name, g[-1].name), [p for block in g for p in block.parameters])
        for g in groups
    ]
