"""The engagement ranker: a user's action sequence and features, a candidate, several heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqkernels.models.cross_network import CrossNetwork
from seqkernels.nn import Linear, ResilientBatchNorm1d, UserSequenceEncoder

_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True)
class EngagementRankerConfig:
    """Sizes and options of an `EngagementRanker`.

    Attributes
    ----------
    num_actions, num_items : int
        Rows of the embedding tables, the padding row 0 included.
    num_dense : int
        F, the number of dense features.
    heads : tuple of str
        What is predicted, one logit each; the names are keys of ``EngagementRanker.heads``.
    action_dim, item_dim : int
        Widths of the embeddings. An event is [action ; item], and a candidate has the width of an
        item, so the encoder is ``action_dim + 2 * item_dim`` wide.
    nhead, dim_feedforward, num_layers : int
        Of the Transformer encoder.
    latest_k : int
        Events of the short-term summary.
    pool : str
        Long-term summary: ``"max"`` over the events, or ``"none"``.
    cross_layers : int
        Layers of the cross network.
    cross_rank : int, optional
        Rank of their weights; ``None``: full.
    hidden : tuple of int
        Widths of the MLP.
    head_hidden : int, optional
        Width of a hidden layer of each head; ``None``: a head is one linear layer.
    dropout, encoder_dropout : float
        Of the MLP after each activation, and of the encoder, while training.
    min_var, max_abs : float
        Bounds of every batch norm, see `ResilientBatchNorm1d`.

    Raises
    ------
    ValueError
        For the first value that does not fit; the message names it.

    Examples
    --------
    >>> from seqkernels.models import EngagementRankerConfig
    >>> config = EngagementRankerConfig(num_actions=6, num_items=1000, num_dense=4)
    >>> config.d_model, config.summary_dim
    (96, 864)
    """

    num_actions: int
    num_items: int
    num_dense: int
    heads: tuple[str, ...] = ("click",)
    action_dim: int = 32
    item_dim: int = 32
    nhead: int = 2
    dim_feedforward: int = 32
    num_layers: int = 2
    latest_k: int = 8
    pool: str = "max"
    cross_layers: int = 2
    cross_rank: int | None = None
    hidden: tuple[int, ...] = (512, 256)
    head_hidden: int | None = None
    dropout: float = 0.1
    encoder_dropout: float = 0.0
    min_var: float = 1e-4
    max_abs: float = 10.0

    def __post_init__(self) -> None:
        for name in ("num_actions", "num_items"):
            self._check_count(name, 2)
        for name in ("num_dense", "action_dim", "item_dim", "nhead", "dim_feedforward"):
            self._check_count(name, 1)
        self._check_count("num_layers", 1)
        self._check_count("cross_layers", 0)
        if self.pool not in ("max", "none"):
            raise _config_error("pool", "'max' or 'none'", self.pool)
        self._check_count("latest_k", 0 if self.pool == "max" else 1)
        for name in ("cross_rank", "head_hidden"):
            if getattr(self, name) is not None:
                self._check_count(name, 1)
        if self.d_model % self.nhead:
            raise _config_error(
                "nhead", f"a divisor of {self.d_model} (action_dim + 2 * item_dim)", self.nhead
            )
        if not (isinstance(self.hidden, tuple) and self.hidden and all(map(_is_size, self.hidden))):
            raise _config_error("hidden", "a tuple of at least one integer above 0", self.hidden)
        if not (isinstance(self.heads, tuple) and self.heads and all(map(_names_head, self.heads))):
            raise _config_error("heads", "a tuple of at least one name of a head", self.heads)
        if len(set(self.heads)) < len(self.heads):
            raise _config_error("heads", "names that differ", self.heads)
        for name in ("dropout", "encoder_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise _config_error(name, "a number in [0, 1)", getattr(self, name))
        if not 0.0 <= self.min_var < math.inf:
            raise _config_error("min_var", "a finite number of at least 0", self.min_var)
        if not self.max_abs > 0.0:
            raise _config_error("max_abs", "a number above 0", self.max_abs)

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= low):
            raise _config_error(name, f"an integer of at least {low}", value)

    @property
    def d_model(self) -> int:
        """Width of the encoder."""
        return self.action_dim + 2 * self.item_dim

    @property
    def summary_dim(self) -> int:
        """Width of the encoder's summary of a history."""
        return (self.latest_k + (self.pool == "max")) * self.d_model

    @property
    def crossed_dim(self) -> int:
        """Width of what is crossed: [summary ; candidate ; dense features]."""
        return self.summary_dim + self.item_dim + self.num_dense


def _config_error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"EngagementRankerConfig: {name}: expected {expected}, got {got!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names_head(name: object) -> bool:
    """Whether a ModuleDict takes it as a key."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.ModuleDict(), name)


class EngagementRanker(nn.Module):
    """Predict engagements of a user with a candidate item.

    ::

        event = [action ; item]                      embeddings; the candidate is an item too
        s  = UserSequenceEncoder(events, candidate)  [latest k ; max over the events]
        x0 = [s ; candidate ; norm(dense)]           norm: ResilientBatchNorm1d
        x  = CrossNetwork(x0)                        DCN-v2, arXiv:2008.13535
        h  = MLP(x)                                  Linear, ResilientBatchNorm1d, ReLU, Dropout
        logits = [head(h) for each head]

    The sequence part is that of TransAct (arXiv:2306.00248); the whole is the engagement model of
    "User Action Sequence Modeling for Pinterest Ads Engagement Modeling" (Pinterest Engineering,
    2024). It trains with torch's autograd. In ``eval`` without gradients the encoder, the norms and
    the linear layers run as kernels; `seqkernels.swap` fuses the MLP and takes large linear layers
    to bf16.

    On the CPU, in float32 and bfloat16, the logits of a user and a candidate have the same bits
    whatever the other pairs of the call, their order and the number of threads.

    Index 0 of both tables is padding: its embedding is zero and is not trained. A position from
    ``lengths`` on is neither read nor returned, in training as in serving, so the logits do not
    depend on what or how much padding there is, and a user without events has a summary of zeros.

    Parameters
    ----------
    config : EngagementRankerConfig
        Sizes and options.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``, for the encoder and
        the norms.

    Attributes
    ----------
    config : EngagementRankerConfig
        As given.
    action, item, sequence, dense_norm, cross, mlp, heads : torch.nn.Module
        The parts, as above.

    Examples
    --------
    >>> import torch
    >>> import seqkernels
    >>> from seqkernels.models import EngagementRanker, EngagementRankerConfig
    >>> config = EngagementRankerConfig(
    ...     num_actions=6, num_items=1000, num_dense=4, heads=("click", "save")
    ... )
    >>> ranker = EngagementRanker(config).eval()
    >>> actions, items = torch.randint(1, 6, (3, 100)), torch.randint(1, 1000, (3, 100))
    >>> lengths, dense = torch.tensor([100, 7, 0]), torch.randn(3, 4)
    >>> with torch.inference_mode():
    ...     logits = ranker(actions, items, lengths, dense, torch.tensor([5, 17, 900]))
    >>> logits.shape
    torch.Size([3, 2])
    """

    def __init__(self, config: EngagementRankerConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.action = embedding(config.num_actions, config.action_dim)
        self.item = embedding(config.num_items, config.item_dim)
        self.sequence = UserSequenceEncoder(
            config.action_dim + config.item_dim,
            config.item_dim,
            config.nhead,
            config.dim_feedforward,
            config.num_layers,
            fusion="concat",
            latest_k=config.latest_k,
            pool=config.pool,
            pool_padding="exclude" if config.pool == "max" else "zero",
            order="latest_first",
            dropout=config.encoder_dropout,
            backend=backend,
        )

        def norm(width: int) -> nn.Module:
            return ResilientBatchNorm1d(
                width, min_var=config.min_var, max_abs=config.max_abs, backend=backend
            )

        # There is no kernel of linear layers elsewhere; torch's product runs there.
        of_cpu = backend if backend in ("cpu", "reference") else "auto"

        def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Module:
            return Linear(in_features, out_features, bias, precision="fp32", backend=of_cpu)

        self.dense_norm = norm(config.num_dense)
        self.cross = CrossNetwork(
            config.crossed_dim, config.cross_layers, config.cross_rank, linear=linear
        )
        self.mlp = mlp(config, norm, linear)
        self.heads = heads(config, linear)

    def forward(
        self, actions: Tensor, items: Tensor, lengths: Tensor, dense: Tensor, candidate: Tensor
    ) -> Tensor:
        """Logits of N pairs of a user and a candidate.

        Parameters
        ----------
        actions, items : Tensor
            [B, L] int64 or int32, the user's events, latest first, padded on the right.
        lengths : Tensor
            [B] int64 or int32: the first ``lengths[b]`` events are valid.
        dense : Tensor
            [B, F] floating.
        candidate : Tensor
            [N] int64 or int32. N = B; or B = 1, and one user is scored with N candidates.

        Returns
        -------
        Tensor
            [N, H], a column for each of ``config.heads``: float32, float64 for a model in float64.

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape, dtype or value.
        """
        self._check(actions, items, lengths, dense, candidate)
        if actions.shape[0] == 1 and candidate.shape[0] != 1:
            return self.score_request(actions, items, lengths, dense, candidate)
        c = _lookup(self.item, candidate, "candidate")  # [N, item_dim]
        events = self._events(actions, items)
        summary = self.sequence(events, c, lengths=lengths)  # [N, summary_dim]
        return self._logits(summary, c, self.dense_norm(dense))

    def score_request(
        self,
        actions: Tensor,
        items: Tensor,
        lengths: Tensor,
        dense: Tensor,
        candidate: Tensor,
        user_index: Tensor | None = None,
    ) -> Tensor:
        """Logits of N candidates of U users, the users' share computed once for each of them.

        Parameters
        ----------
        actions, items : Tensor
            [U, L] int64 or int32, as in `forward`.
        lengths : Tensor
            [U] int64 or int32.
        dense : Tensor
            [U, F] floating.
        candidate : Tensor
            [N] int64 or int32.
        user_index : Tensor, optional
            [N] int64 or int32 in 0 .. U - 1: whose candidate each is. May be left out for one user.

        Returns
        -------
        Tensor
            [N, H], as `forward` gives for each pair of a user and a candidate.

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape, dtype or value.

        Examples
        --------
        >>> import torch
        >>> from seqkernels.models import EngagementRanker, EngagementRankerConfig
        >>> config = EngagementRankerConfig(num_actions=6, num_items=1000, num_dense=4)
        >>> ranker = EngagementRanker(config).eval()
        >>> actions, items = torch.randint(1, 6, (1, 100)), torch.randint(1, 1000, (1, 100))
        >>> with torch.inference_mode():
        ...     logits = ranker.score_request(
        ...         actions, items, torch.tensor([60]), torch.randn(1, 4), torch.arange(1, 257)
        ...     )
        >>> logits.shape
        torch.Size([256, 1])
        """
        self._check(actions, items, lengths, dense, candidate, of_pairs=False)
        if user_index is None and actions.shape[0] != 1:
            raise ValueError(
                f"EngagementRanker: user_index: expected a tensor for {actions.shape[0]} users, "
                "got None"
            )
        c = _lookup(self.item, candidate, "candidate")  # [N, item_dim]
        summary = self.sequence.score_candidates(
            self._events(actions, items), c, user_index, lengths=lengths
        )  # [N, summary_dim]
        normed = self.dense_norm(dense)  # [U, F]
        if user_index is None:
            normed = normed.expand(candidate.shape[0], -1)
        else:
            normed = normed[user_index.to(torch.int64)]
        return self._logits(summary, c, normed)

    def _events(self, actions: Tensor, items: Tensor) -> Tensor:
        """[B, L, action_dim + item_dim]."""
        return torch.cat(
            (_lookup(self.action, actions, "actions"), _lookup(self.item, items, "items")), -1
        )

    def _logits(self, summary: Tensor, c: Tensor, normed: Tensor) -> Tensor:
        """[N, H] of the three parts of x0, [N, ...] each."""
        # Normalized as it came: rounded to bf16 first, a large mean would swallow the feature.
        x0 = torch.cat((summary, c, normed.to(c.dtype)), -1)  # [N, crossed_dim]
        h = self.mlp(self.cross(x0))
        logits = torch.cat([head(h) for head in self.heads.values()], -1)  # [N, H]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def predict(
        self, actions: Tensor, items: Tensor, lengths: Tensor, dense: Tensor, candidate: Tensor
    ) -> dict[str, Tensor]:
        """Probabilities by head, [N] each; parameters as in `forward`.

        Torch's sigmoid rounds some values otherwise at the end of a tensor than before it: compare
        logits where bits count.
        """
        p = self(actions, items, lengths, dense, candidate).sigmoid()
        return dict(zip(self.config.heads, p.unbind(-1), strict=True))

    def _check(
        self,
        actions: Tensor,
        items: Tensor,
        lengths: Tensor,
        dense: Tensor,
        candidate: Tensor,
        *,
        of_pairs: bool = True,
    ) -> None:
        """Raise unless the inputs fit each other and the config; no value is looked at."""
        given = {"actions": actions, "items": items, "lengths": lengths, "candidate": candidate}
        for name, tensor in given.items():
            if tensor.dtype not in _INDEX_DTYPES:
                raise TypeError(
                    f"EngagementRanker: {name}: expected int64 or int32, got {tensor.dtype}"
                )
        if not dense.dtype.is_floating_point:
            raise TypeError(f"EngagementRanker: dense: expected floating, got {dense.dtype}")
        if actions.dim() != 2:
            raise _shape_error("actions", "2 dimensions [B, L]", actions)
        batch, width = actions.shape[0], self.config.num_dense
        if items.shape != actions.shape:
            raise _shape_error("items", f"{tuple(actions.shape)}, that of actions,", items)
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            raise _shape_error("lengths", f"({batch},), B of actions,", lengths)
        if dense.dim() != 2 or dense.shape[0] != batch or dense.shape[1] != width:
            raise _shape_error("dense", f"({batch}, {width}), B of actions and num_dense,", dense)
        if not of_pairs:
            batch = 1  # any number of candidates
        if candidate.dim() != 1 or (batch != 1 and candidate.shape[0] != batch):
            expected = "1 dimension [N]" if batch == 1 else f"({batch},), B of actions,"
            raise _shape_error("candidate", expected, candidate)


def _shape_error(name: str, expected: str, tensor: Tensor) -> ValueError:
    return ValueError(
        f"EngagementRanker: {name}: expected shape {expected} got {tuple(tensor.shape)}"
    )


def _lookup(table: nn.Embedding, index: Tensor, name: str) -> Tensor:
    """Rows of a table, with an error that names the input."""
    if torch.compiler.is_compiling():
        rows: Tensor = table(index)
        return rows
    try:
        rows = table(index)
    except IndexError:
        raise ValueError(
            f"EngagementRanker: {name}: expected indices in [0, {table.num_embeddings}), "
            f"got {int(index.min())} to {int(index.max())}"
        ) from None
    return rows


def embedding(count: int, width: int) -> nn.Embedding:
    """A table whose row 0 is padding."""
    table = nn.Embedding(count, width, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=0.1)  # of torch's 1.0 a rare item would keep too much
        table.weight[0] = 0.0
    return table


def mlp(
    config: EngagementRankerConfig,
    norm: Callable[[int], nn.Module],
    linear: Callable[..., nn.Module] = nn.Linear,
) -> nn.Sequential:
    """The MLP, with the batch norms and linear layers that these make."""
    layers: list[nn.Module] = []
    width = config.crossed_dim
    for hidden in config.hidden:
        # The norm subtracts a mean and adds its own bias, so the linear layer needs none.
        layers += [linear(width, hidden, bias=False), norm(hidden), nn.ReLU()]
        layers.append(nn.Dropout(config.dropout))
        width = hidden
    return nn.Sequential(*layers)


def heads(
    config: EngagementRankerConfig, linear: Callable[..., nn.Module] = nn.Linear
) -> nn.ModuleDict:
    """One small network for each head, by name, of the linear layers that `linear` makes."""
    width, hidden = config.hidden[-1], config.head_hidden

    def head() -> nn.Module:
        if hidden is None:
            return linear(width, 1)
        return nn.Sequential(linear(width, hidden), nn.ReLU(), linear(hidden, 1))

    return nn.ModuleDict({name: head() for name in config.heads})
