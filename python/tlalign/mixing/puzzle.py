"""Puzzle Mix: masks cut from a graph of saliency, and blocks transported to where they are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlalign.mixing.strategy import MixingStrategy, Mode, check_not_negative, check_positive, draw_ratios, to_device
from tlalign_kernels.labels import MixedTarget

# Blocks along each side of the image; one of these is drawn for each batch.
GRIDS = (2, 4, 8, 16)
# A block is of the image (0), of its partner (2), or half of each (1).
_LEVELS = 2
# Side in pixels of the cells at the border of two blocks that are compared.
_BORDER = 4
# Capacities are integers of 32 bits, whose sum must be one too.
_CAPACITY = 2**30


class PuzzleMix(MixingStrategy):
    """Puzzle Mix: shows of each of two images what is salient in it (arXiv 2009.06962).

    The image is cut into blocks, 2 x 2 to 16 x 16 of them, one grid drawn for each batch. The part z of the partner in
    each block, 0, 1/2 or 1, minimises (section 4 of the paper)

        sum_i z_i s_i + (1 - z_i) t_i - eta log p(z_i) / n + b sum_ij (z_i - z_j)^2 + gamma phi_ij(z_i, z_j)

    with the saliency s and t of the image and its partner (of sum 1), the binomial p of the drawn ratio, the n blocks,
    neighbours i and j, the step phi between their pixels, and b = beta / (16 * blocks along a side), as the authors'
    code scales it. It is found exactly, by one minimum cut. Then the blocks of each image are moved to where it is
    seen: the assignment that shows most saliency less xi times the distance squared (exact as well, where the paper
    approximates). A token's label is the z of its pixels.

    On the CPU, for each image: 1 ms for 4 x 4 blocks, 6 ms for 16 x 16, and a forward and backward of the model.

    Args:
        saliency: Gives the saliency (B, Hi, Wi) of images (B, channels, Hi, Wi) and classes (B,), such as
            `GradientSaliency(model)`.
        alpha: The ratio of the prior is Beta(alpha, alpha); > 0. 1 in the paper.
        beta: Weight of a label's smoothness; 1.2 in the paper.
        gamma: Weight of the pixels' smoothness, in [0, 1] and relative to `beta`; 0.5 in the paper.
        eta: Weight of the prior; 0.2 in the paper.
        xi: Cost of transport; 0.8 in the paper. None: blocks stay where they are.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`, for the ratio of the prior.
        seed: As in `MixingStrategy`.

    Raises:
        ModuleNotFoundError: If SciPy, whose maximum flow and assignment are used, is not installed.
        TypeError: If no saliency is given.
    """

    averages_pixels = True

    def __init__(
        self,
        saliency: Callable[[Tensor, Tensor], Tensor] | None = None,
        alpha: float = 1.0,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        xi: float | None = 0.8,
        prob: float = 1.0,
        mode: Mode = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(prob, mode, seed)
        if not callable(saliency):
            raise TypeError(
                "saliency: expected a callable that gives the saliency of images and classes, such as "
                f"GradientSaliency(model), got {type(saliency).__name__}"
            )
        self.beta = check_not_negative("beta", beta)
        self.gamma = check_not_negative("gamma", gamma)
        self.eta = check_not_negative("eta", eta)
        self.xi = None if xi is None else check_not_negative("xi", xi)
        if gamma > 1:
            raise ValueError(f"gamma: expected a number in [0, 1], beyond which a cut finds no minimum, got {gamma}")
        _scipy()
        self.saliency = saliency
        self.alpha = check_positive("alpha", alpha)
        self._moves: tuple[Tensor, Tensor] | None = None

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        image_size = tuple(images.shape[-2:])
        fitting = [grid for grid in GRIDS if not any(side % grid for side in image_size)]
        if not fitting:
            raise ValueError(f"images: expected sides that are multiples of 2 for Puzzle Mix, got {image_size}")
        grid = fitting[self.generator.integers(len(fitting))]
        ratio = draw_ratios(self.generator, int(draw_index.max()) + 1, self.alpha)[draw_index]
        if chosen.any():
            saliency = self._block_saliency(images, classes[:, 0], grid)
            steps = _border_steps(images.detach().float(), grid)
        parts = np.zeros((len(images), grid, grid))
        moves = np.tile(np.arange(grid**2), (2, len(images), 1))
        for index in np.flatnonzero(chosen):
            own, partner = saliency[index], saliency[-1 - index]
            parts[index] = self._cut(own, partner, ratio[index], [step[:, :, index] for step in steps])
            if self.xi is not None:
                moves[0, index] = transport(own, parts[index] < 1, self.xi)
                moves[1, index] = transport(partner, parts[index] > 0, self.xi)
        self._moves = tuple(to_device(move, images.device) for move in moves)
        masks = to_device(parts.astype(np.float32), images.device)[:, None]
        masks = masks.repeat_interleave(image_size[0] // grid, 2).repeat_interleave(image_size[1] // grid, 3)
        own, partner = (
            move_blocks(part, move) for part, move in zip((images, images.flip(0)), self._moves, strict=True)
        )
        mixed = torch.empty_like(images)  # keeps the layout in memory
        mixed.copy_(own.lerp(partner, masks.to(images.dtype)))  # every dtype has the weights 0, 1/2 and 1
        return mixed, MixedTarget.from_masks(classes, masks)

    def origins(self, target: MixedTarget, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As for every strategy; blocks were moved."""
        pixels = torch.arange(math.prod(image_size), device=target.device).view(1, 1, *image_size)
        pixels = pixels.expand(target.batch_size, -1, -1, -1)
        return tuple(move_blocks(pixels, move).flatten(1) for move in self._moves)

    def _block_saliency(self, images: Tensor, classes: Tensor, grid: int) -> np.ndarray:
        """Saliency of the blocks, (B, grid, grid) of sum 1."""
        saliency = self.saliency(images, classes)
        expected = (len(images), *images.shape[-2:])
        if saliency.shape != expected:
            raise ValueError(f"saliency: expected maps of shape {expected}, got {tuple(saliency.shape)}")
        blocks = F.adaptive_avg_pool2d(saliency.detach().float(), grid).cpu().double()
        # Of weights that are no numbers any more, which the loss will say, nothing is salient.
        blocks = blocks.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        # An image without any saliency has the same everywhere.
        blocks = blocks + torch.finfo(torch.float32).tiny
        return (blocks / blocks.sum(dim=(1, 2), keepdim=True)).numpy()

    def _cut(self, own: np.ndarray, partner: np.ndarray, ratio: float, steps: list[np.ndarray]) -> np.ndarray:
        """The part of the partner in each block of one image, (grid, grid)."""
        grid, level = len(own), np.arange(_LEVELS + 1) / _LEVELS
        beta = self.beta / (16 * grid)
        log_prior = np.log(np.array([(1 - ratio) ** 2, 2 * ratio * (1 - ratio), ratio**2]) + 1e-8)
        cost = level * own[..., None] + (1 - level) * partner[..., None] - self.eta * log_prior / grid**2
        smooth = []
        # phi is the step between the pixels that are seen, bilinear in z_i and z_j: its product term is one of squares.
        for step, first, second in zip(steps, (np.s_[:-1], np.s_[:, :-1]), (np.s_[1:], np.s_[:, 1:]), strict=True):
            weight = beta * self.gamma
            product = step[0, 0] + step[1, 1] - step[0, 1] - step[1, 0]
            for place, alone in ((first, step[1, 0] - step[0, 0]), (second, step[0, 1] - step[0, 0])):
                cost[place] += weight * (alone[..., None] * level + product[..., None] * level**2 / 2)
            smooth.append(beta - weight * product / 2)
        return cut_levels(cost, *smooth) / _LEVELS


class GradientSaliency:
    """Saliency by the gradient of the cross entropy: its norm over the channels of each pixel, as Puzzle Mix takes it.

    It is so up to a factor of each image, which has no part in where that is salient: what is taken is the gradient of
    how far the other classes are ahead of the image's. That is the cross entropy's divided by the probability that they
    have together, and doesn't vanish in float16 where the model is sure. The model runs as in evaluation, so that
    nothing random and no running average has a part in it.

    Args:
        model: Model that returns logits (B, C) of images, or a tuple that starts with them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Returns the saliency (B, Hi, Wi) of images (B, channels, Hi, Wi) of classes int64 (B,)."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.enable_grad():
                images = images.detach().requires_grad_()
                logits = self.model(images)
                logits = (logits[0] if isinstance(logits, tuple) else logits).float()
                others = logits.scatter(1, classes[:, None], torch.finfo(logits.dtype).min).logsumexp(dim=1)
                ahead = others - logits.gather(1, classes[:, None])[:, 0]
                (gradient,) = torch.autograd.grad(ahead.sum(), images)
        finally:
            for module, training in modes:
                module.training = training
        return gradient.float().square().mean(dim=1).sqrt()


def cut_levels(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Minimises the cost of a level for each cell of a grid plus weighted squares of differences between neighbours.

    The cost is cost[i, level_i] + sum of weight * ((level_i - level_j) / L)^2. A cell is a chain of L nodes from
    source to sink; the edge that a cut takes is its level (Ishikawa 2003). An edge between all nodes of two chains
    costs (level_i - level_j)^2 up to what each level adds alone.

    Args:
        cost: (h, w, L + 1), of any sign.
        down: (h - 1, w), weights of neighbours in a column, >= 0.
        right: (h, w - 1), weights of neighbours in a row, >= 0.

    Returns:
        (h, w) int64, the levels.
    """
    scipy = _scipy()
    rows, columns, levels = cost.shape[0], cost.shape[1], cost.shape[2] - 1
    cost, level = cost.copy(), np.arange(levels + 1)
    for weight, first, second in ((down, np.s_[:-1], np.s_[1:]), (right, np.s_[:, :-1], np.s_[:, 1:])):
        for place in (first, second):
            cost[place] += weight[..., None] * level * (level - levels) / levels**2
    # Each chain is cut once, so that what is added to all its edges changes nothing.
    cost -= cost.min(axis=2, keepdims=True)
    scale = _CAPACITY / (cost.max(axis=2).sum() + np.finfo(float).tiny)

    cells = np.arange(rows * columns).reshape(rows, columns)
    nodes = 1 + cells[..., None] * levels + np.arange(levels)  # 0 is the source, the last one the sink
    sink = 1 + cells.size * levels
    chain = np.concatenate((np.zeros_like(cells)[..., None], nodes, np.full_like(cells, sink)[..., None]), axis=2)
    tails, heads, capacities = [chain[..., :-1]], [chain[..., 1:]], [np.rint(cost * scale)]
    # Without endless edges back up the chain a cut could take two of its edges.
    tails.append(nodes[..., 1:])
    heads.append(nodes[..., :-1])
    capacities.append(np.full(nodes[..., 1:].shape, _CAPACITY))
    for weight, first, second in ((down, nodes[:-1], nodes[1:]), (right, nodes[:, :-1], nodes[:, 1:])):
        pairs = np.broadcast_arrays(first[..., :, None], second[..., None, :])
        shared = np.broadcast_to(np.rint(weight * scale / levels**2)[..., None, None], pairs[0].shape)
        tails += pairs
        heads += pairs[::-1]
        capacities += [shared, shared]
    tails, heads, capacities = (
        np.concatenate([part.ravel() for part in parts]) for parts in (tails, heads, capacities)
    )
    capacities = capacities.clip(0, _CAPACITY).astype(np.int32)
    graph = scipy.sparse.csr_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1))
    flow = scipy.sparse.csgraph.maximum_flow(graph, 0, sink).flow
    left = (graph - flow).tocsr()
    left.data = (left.data > 0).astype(np.int32)
    left.eliminate_zeros()
    reached = np.zeros(sink + 1, dtype=bool)
    reached[scipy.sparse.csgraph.breadth_first_order(left, 0, return_predecessors=False)] = True
    return reached[nodes].sum(axis=2)


def transport(saliency: np.ndarray, seen: np.ndarray, xi: float) -> np.ndarray:
    """Moves blocks to where they are seen, at the cost of xi times the distance squared.

    Args:
        saliency: (g, g), of the blocks.
        seen: (g, g) bool, the places where the image is seen.
        xi: Cost of the distance that is the side of the grid.

    Returns:
        (g * g,) int64, which block each place gets.
    """
    grid = len(saliency)
    row, column = np.divmod(np.arange(grid**2), grid)
    distance = ((row[:, None] - row) ** 2 + (column[:, None] - column) ** 2) / (grid - 1) ** 2
    cost = xi * distance - seen.reshape(-1, 1) * saliency.reshape(1, -1)
    return _scipy().optimize.linear_sum_assignment(cost)[1]


def move_blocks(images: Tensor, moves: Tensor) -> Tensor:
    """Moves the blocks of images.

    Args:
        images: (B, channels, Hi, Wi).
        moves: int64 (B, g * g), which block each place gets; g divides Hi and Wi.

    Returns:
        (B, channels, Hi, Wi).
    """
    grid = math.isqrt(moves.shape[1])
    blocks = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks[torch.arange(len(images), device=images.device)[:, None], moves]
    return blocks.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _border_steps(images: Tensor, grid: int) -> list[np.ndarray]:
    """Mean absolute steps of pixels across the borders of blocks, as parts of the range of all pixels.

    Returns:
        Those to the block below, (2, 2, B, grid - 1, grid), and to the right, (2, 2, B, grid, grid - 1); the first two
        indices say whether the block, and its neighbour, are of the image (0) or of its partner (1).
    """
    low, high = images.min(), images.max()
    images = (images - low) / (high - low).clamp(min=torch.finfo(images.dtype).tiny)
    steps = []
    for turned in (images, images.transpose(2, 3)):
        strips = turned.unflatten(2, (grid, -1))
        # What is next to the lower, and to the upper border of each block; then in cells along it.
        above, below = strips[:, :, :-1, -_BORDER:].mean(dim=3), strips[:, :, 1:, :_BORDER].mean(dim=3)
        width = math.gcd(_BORDER, turned.shape[3] // grid)
        above, below = (F.avg_pool2d(strip, (1, width)) for strip in (above, below))
        of_pairs = torch.stack([
            torch.stack([(first - second).abs().mean(dim=1) for second in (below, below.flip(0))])
            for first in (above, above.flip(0))
        ])  # fmt: skip
        of_pairs = of_pairs.unflatten(-1, (grid, -1)).mean(dim=-1)
        steps.append(of_pairs if turned is images else of_pairs.transpose(-1, -2))
    return [step.cpu().double().numpy() for step in steps]


def _scipy() -> ModuleType:
    try:
        import scipy.optimize
        import scipy.sparse.csgraph
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("Puzzle Mix needs SciPy: pip install 'tlalign-kernels[train]'") from missing
    return scipy
