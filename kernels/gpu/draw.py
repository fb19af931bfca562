"""The passes of `kernels.gpu.sampling` that draw a token of each sampled lane: survey, collect, finish.

`edges` are 16 ascending distances; of each tile a survey leaves how many tokens, and how much weight, lie within each.
The bracket of a lane is the pair of edges between which its cuts lie: top_k's cut between the last edge with fewer
than k tokens within it and the next; top_p's likewise by weight. top_p's share is of what top_k keeps, which is known
only to lie between the weights within those two edges, so with both the bracket reaches from top_p's lower edge for
the least such share to top_k's upper one. The edges of the second survey divide the bracket of the first evenly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import sampling as meaning

NUM_EDGES = tl.constexpr(16)
# A lane with no more tokens than this in its first bracket needs no second survey.
FEW = tl.constexpr(2048)
# Tokens of a list that are looked at together.
CHUNK = tl.constexpr(1024)

FAR = tl.constexpr(meaning.FAR)
DISTANCE_UNITS = tl.constexpr(float(1 << meaning.DISTANCE_BITS))
WEIGHT_UNITS = tl.constexpr(float(1 << meaning.WEIGHT_BITS))
WEIGHT_SHIFT = tl.constexpr(meaning.WEIGHT_BITS - 32)
LOG2_E = tl.constexpr(meaning.LOG2_E)
EXPONENT_BITS = tl.constexpr(meaning.EXPONENT_BITS)
ONE = tl.constexpr(1 << 32)
C0, C1, C2, C3, C4 = (tl.constexpr(coefficient) for coefficient in meaning.EXP2_COEFFICIENTS)
M0, M1 = (tl.constexpr(multiplier) for multiplier in meaning.PHILOX_MULTIPLIERS)
S0, S1 = (tl.constexpr(step) for step in meaning.PHILOX_STEPS)


@triton.jit
def _distances(logits, token, largest, temperature, vocab_size):
    """Return int32 distances; FAR outside the vocabulary and of what is not a number."""
    x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    # Equal to the largest is at distance 0 even where both are infinite.
    scaled = (largest - tl.where(x == largest, 0.0, x)) * tl.div_rn(1.0, temperature) * DISTANCE_UNITS
    scaled = tl.where(x == largest, 0.0, scaled)
    return tl.where(token < vocab_size, tl.minimum(scaled, FAR * 1.0).to(tl.int32), FAR)


@triton.jit
def _weights(distance, least):
    """Return int64 weights; 0 below `least`."""
    exponent = distance.to(tl.uint32).to(tl.uint64) * LOG2_E
    fraction = (exponent >> (EXPONENT_BITS - 32)).to(tl.uint32)
    series = C3 - tl.umulhi(tl.full(fraction.shape, C4, tl.uint32), fraction)
    series = C2 - tl.umulhi(series, fraction)
    series = C1 - tl.umulhi(series, fraction)
    series = C0 - tl.umulhi(series, fraction)
    power = ONE - tl.umulhi(series, fraction).to(tl.int64)
    weight = (power << WEIGHT_SHIFT) >> (exponent >> EXPONENT_BITS).to(tl.int64)
    return tl.where(weight >= least, weight, 0)


@triton.jit
def _least_weight(min_p):
    return tl.maximum((min_p * WEIGHT_UNITS).to(tl.int64), 1)


@triton.jit
def _needed(total, top_p):
    """Return how much of a weight top_p must reach."""
    share = (top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(share, total), 1)


@triton.jit
def _random_bits(seed, index):
    """Return Philox4x32-10's first 64 bits as a uint64."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, c0 * 0 + M0), c0 * M0
        high1, low1 = tl.umulhi(c2, c2 * 0 + M1), c2 * M1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + S0, key1 + S1
    return (c0.to(tl.uint64) << 32) | c1.to(tl.uint64)


@triton.jit
def _at(values, place):
    """Return the element of a vector at a place; 0 outside."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == place, values, 0), axis=0)


@triton.jit
def _column(matrix, place):
    """Return one column of a matrix `[tiles, NUM_EDGES]`."""
    return tl.sum(tl.where(tl.arange(0, NUM_EDGES)[None, :] == place, matrix, 0), axis=1)


@triton.jit
def _first(holds):
    """Return the first place at which a vector of NUM_EDGES holds; NUM_EDGES where it never does."""
    return tl.min(tl.where(holds, tl.arange(0, NUM_EDGES), NUM_EDGES), axis=0)


@triton.jit
def _first_edges():
    """Return -1, then 1/4, 3/8, 1/2, 3/4, ... 24, and the last distance before FAR; int64."""
    step = tl.maximum(tl.arange(0, NUM_EDGES) - 1, 0).to(tl.int64)
    edges = tl.minimum((2 + (step & 1)) << (23 + (step >> 1)), FAR - 1)
    return tl.where(tl.arange(0, NUM_EDGES) == 0, -1, edges)


@triton.jit
def _inner_edges(low, high):
    """Return `low` to `high`, both included, evenly; int64."""
    step = (high - low + NUM_EDGES - 2) // (NUM_EDGES - 1)
    return tl.minimum(low + step * tl.arange(0, NUM_EDGES).to(tl.int64), high)


@triton.jit
def _survey(counts, masses, level, lane, num_lanes, num_tiles: tl.constexpr, width: tl.constexpr):
    """Load one survey of a lane: counts and masses `[width, NUM_EDGES]`, int64."""
    tiles = tl.arange(0, width)
    place = ((level * num_lanes + lane) * num_tiles + tiles[:, None]) * NUM_EDGES + tl.arange(0, NUM_EDGES)[None, :]
    mask = (tiles < num_tiles)[:, None] & (tl.arange(0, NUM_EDGES) >= 0)[None, :]
    return tl.load(counts + place, mask=mask, other=0).to(tl.int64), tl.load(masses + place, mask=mask, other=0)


@triton.jit
def _bracket(num, mass, all_mass, top_k, top_p):
    """Return the places of the two edges between which the cuts lie; equal where nothing is cut.

    num and mass: the lane's tokens and weight within each edge; all_mass: its weight whatever the distance.
    """
    last = NUM_EDGES - 1
    by_count = (top_k > 0) & (_at(num, last) >= top_k)
    upper = tl.where(by_count, tl.minimum(_first(num >= top_k), last), last)
    # The least weight that top_k may turn out to keep.
    kept = tl.where(by_count, _at(mass, upper - 1), all_mass)
    reached = tl.minimum(_first(mass >= _needed(kept, top_p)), last)
    by_mass = top_p < 1.0
    upper = tl.where(by_mass & (by_count == 0), reached, upper)
    # The first edge holds by what was known before: finer edges may guess less of what top_k keeps.
    lower = tl.where(by_mass, tl.maximum(reached - 1, 0), tl.where(by_count, upper - 1, last))
    return lower, upper


@triton.jit
def _find_bracket(counts, masses, lane, num_lanes, top_k, top_p, num_tiles: tl.constexpr, width: tl.constexpr):
    """Return the lane's bracket after both surveys.

    Its distances (above the first, up to the second); by tile the tokens within each of them and the weight within
    the first; the tokens and the weight of the whole lane.
    """
    edges = _first_edges()
    num, mass = _survey(counts, masses, 0, lane, num_lanes, num_tiles, width)
    lane_num, lane_mass = tl.sum(num, axis=0), tl.sum(mass, axis=0)
    all_num, all_mass = _at(lane_num, NUM_EDGES - 1), _at(lane_mass, NUM_EDGES - 1)
    lower, upper = _bracket(lane_num, lane_mass, all_mass, top_k, top_p)
    low, high = _at(edges, lower), _at(edges, upper)
    num_low, num_high, mass_low = _column(num, lower), _column(num, upper), _column(mass, lower)
    if _at(lane_num, upper) - _at(lane_num, lower) > FEW:
        edges = _inner_edges(low, high)
        num, mass = _survey(counts, masses, 1, lane, num_lanes, num_tiles, width)
        lower, upper = _bracket(tl.sum(num, axis=0), tl.sum(mass, axis=0), all_mass, top_k, top_p)
        low, high = _at(edges, lower), _at(edges, upper)
        num_low, num_high, mass_low = _column(num, lower), _column(num, upper), _column(mass, lower)
    return low, high, num_low, num_high, mass_low, all_num, all_mass


@triton.jit
def _largest(maxima, lane, num_tiles: tl.constexpr, width: tl.constexpr):
    tiles = tl.arange(0, width)
    return tl.max(tl.load(maxima + lane * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")), axis=0)


@triton.jit
def _within(distance, weight, edges, start):
    """Return how many tokens of a tile, and how much weight, lie within each edge from `start` on."""
    column = tl.arange(0, NUM_EDGES)
    num, mass = tl.zeros([NUM_EDGES], tl.int32), tl.zeros([NUM_EDGES], tl.int64)
    # Edges below the nearest token have nothing within.
    i = tl.maximum(start, tl.sum((edges < tl.min(distance, axis=0)).to(tl.int32), axis=0))
    while i < NUM_EDGES:
        within = distance <= _at(edges, i)
        num = tl.where(column == i, tl.sum(within.to(tl.int32), axis=0), num)
        mass = tl.where(column == i, tl.sum(tl.where(within, weight, 0), axis=0), mass)
        i += 1
    return num, mass


@triton.jit(do_not_specialize=["num_lanes"])
def survey_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    maxima,
    counts,
    masses,
    logits_stride,
    num_lanes,
    level: tl.constexpr,
    vocab_size: tl.constexpr,
    num_tiles: tl.constexpr,
    tiles_width: tl.constexpr,
    tile: tl.constexpr,
):
    """Count and weigh the tokens of some tiles within each edge; the second level where a lane needs it."""
    lane = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + lane)
    if temperature > 0:
        top_k, top_p = tl.load(top_ks + lane), tl.load(top_ps + lane)
        edges = _first_edges()
        # Without top_k and top_p only the weight of all is wanted.
        start = tl.where((top_k > 0) | (top_p < 1.0), 0, NUM_EDGES - 1)
        if level == 1:
            tile_num, tile_mass = _survey(counts, masses, 0, lane, num_lanes, num_tiles, tiles_width)
            lane_num, lane_mass = tl.sum(tile_num, axis=0), tl.sum(tile_mass, axis=0)
            lower, upper = _bracket(lane_num, lane_mass, _at(lane_mass, NUM_EDGES - 1), top_k, top_p)
            edges = _inner_edges(_at(edges, lower), _at(edges, upper))
            start = tl.where(_at(lane_num, upper) - _at(lane_num, lower) > FEW, 0, NUM_EDGES)
        if start < NUM_EDGES:
            largest = _largest(maxima, lane, num_tiles, tiles_width)
            least = _least_weight(tl.load(min_ps + lane))
            part = tl.program_id(0)
            while part < num_tiles:
                token = part * tile + tl.arange(0, tile)
                distance = _distances(logits + lane * logits_stride, token, largest, temperature, vocab_size)
                num, mass = _within(distance, _weights(distance, least), edges, start)
                place = ((level * num_lanes + lane) * num_tiles + part) * NUM_EDGES + tl.arange(0, NUM_EDGES)
                tl.store(counts + place, num)
                tl.store(masses + place, mass)
                part += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_lanes"])
def collect_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    maxima,
    counts,
    masses,
    near,
    logits_stride,
    num_lanes,
    vocab_size: tl.constexpr,
    num_tiles: tl.constexpr,
    tiles_width: tl.constexpr,
    tile: tl.constexpr,
):
    """Write the distances of some tiles inside the lane's bracket to their places in the lane's list."""
    lane = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + lane)
    if temperature > 0:
        low, high, num_low, num_high, _mass, _num, _all = _find_bracket(
            counts, masses, lane, num_lanes, tl.load(top_ks + lane), tl.load(top_ps + lane), num_tiles, tiles_width
        )
        num_inside = num_high - num_low
        largest = _largest(maxima, lane, num_tiles, tiles_width)
        part = tl.program_id(0)
        while part < num_tiles:
            if _at(num_inside, part) > 0:
                token = part * tile + tl.arange(0, tile)
                distance = _distances(logits + lane * logits_stride, token, largest, temperature, vocab_size)
                inside = (distance > low) & (distance <= high)
                before = tl.sum(tl.where(tl.arange(0, tiles_width) < part, num_inside, 0), axis=0)
                place = before + tl.cumsum(inside.to(tl.int32), axis=0) - 1
                tl.store(near + lane * vocab_size + place, distance, mask=inside)
            part += tl.num_programs(0)


@triton.jit
def _sums(near, num, limits, cut, least, kind: tl.constexpr):
    """Sum over a list what lies within each of NUM_EDGES limits, int64.

    kind "count": the tokens up to each distance; "weight": their weight; "place": the weight of the list's first so
    many, as far as their distance is at most `cut`.
    """
    sums = tl.zeros([NUM_EDGES], tl.int64)
    start = num * 0
    while start < num:
        place = start + tl.arange(0, CHUNK)
        distance = tl.load(near + place, mask=place < num, other=FAR)
        if kind == "count":
            value = (place < num).to(tl.int64)
        else:
            value = tl.where(distance <= cut, _weights(distance, least), 0)
        if kind == "place":
            within = place.to(tl.int64)[:, None] < limits[None, :]
        else:
            within = distance.to(tl.int64)[:, None] <= limits[None, :]
        sums += tl.sum(tl.where(within, value[:, None], 0), axis=0)
        start += CHUNK
    return sums


@triton.jit
def _search(near, num, low, high, base, needed, least, kind: tl.constexpr):
    """Return the smallest distance in (low, high] up to which list and `base` together have what is needed."""
    while high - low > 1:
        step = (high - low + NUM_EDGES) // (NUM_EDGES + 1)
        limits = tl.minimum(low + step * (tl.arange(0, NUM_EDGES).to(tl.int64) + 1), high)
        reached = _first(base + _sums(near, num, limits, FAR, least, kind) >= needed)
        high = tl.where(reached == NUM_EDGES, high, tl.minimum(low + step * (reached + 1), high))
        low = low + step * reached
    return high


@triton.jit
def _find_tile(near, point, cut, least, num_inside, mass_low, num_tiles: tl.constexpr, width: tl.constexpr):
    """Return the tile in which the cumulated weight passes a point, and the weight before it."""
    ends, masses = tl.cumsum(num_inside, axis=0), tl.cumsum(mass_low, axis=0)
    num = tl.sum(num_inside, axis=0)
    tiles = tl.arange(0, width)
    low, high = tl.full([], -1, tl.int32), tl.full([], num_tiles - 1, tl.int32)
    before = tl.full([], 0, tl.int64)
    while high - low > 1:
        step = (high - low + NUM_EDGES) // (NUM_EDGES + 1)
        tried = tl.minimum(low + step * (tl.arange(0, NUM_EDGES) + 1), high)
        is_tried = tiles[:, None] == tried[None, :]
        limits = tl.sum(tl.where(is_tried, ends[:, None], 0), axis=0)
        sums = tl.sum(tl.where(is_tried, masses[:, None], 0), axis=0)
        sums += _sums(near, num, limits, cut, least, "place")
        passed = _first(sums > point)
        before = tl.where(passed == 0, before, _at(sums, passed - 1))
        high = tl.where(passed == NUM_EDGES, high, tl.minimum(low + step * (passed + 1), high))
        low = low + step * passed
    return high, before


@triton.jit(do_not_specialize=["num_lanes"])
def finish_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    maxima,
    counts,
    masses,
    near,
    firsts,
    seeds,
    indices,
    chosen,
    logits_stride,
    num_lanes,
    vocab_size: tl.constexpr,
    num_tiles: tl.constexpr,
    tiles_width: tl.constexpr,
    tile: tl.constexpr,
):
    """Choose the token of one lane."""
    lane = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + lane)
    largest = _largest(maxima, lane, num_tiles, tiles_width)
    if (temperature > 0) & (largest > float("-inf")):
        top_k, top_p = tl.load(top_ks + lane), tl.load(top_ps + lane)
        least = _least_weight(tl.load(min_ps + lane))
        low, cut, num_low, num_high, mass_low, all_num, kept = _find_bracket(
            counts, masses, lane, num_lanes, top_k, top_p, num_tiles, tiles_width
        )
        num_inside, base = num_high - num_low, tl.sum(mass_low, axis=0)
        near += lane * vocab_size
        num = tl.sum(num_inside, axis=0)
        if (top_k > 0) & (top_k <= all_num):
            cut = _search(near, num, low, cut, tl.sum(num_low, axis=0), top_k, least, "count")
            kept = base + _at(_sums(near, num, tl.full([NUM_EDGES], 0, tl.int64) + cut, FAR, least, "weight"), 0)
        total = kept
        if top_p < 1.0:
            cut = _search(near, num, low, cut, base, _needed(kept, top_p), least, "weight")
            total = base + _at(_sums(near, num, tl.full([NUM_EDGES], 0, tl.int64) + cut, FAR, least, "weight"), 0)
        bits = _random_bits(tl.load(seeds + lane), tl.load(indices + lane))
        point = tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
        part, before = _find_tile(near, point, cut, least, num_inside, mass_low, num_tiles, tiles_width)
        token = part * tile + tl.arange(0, tile)
        distance = _distances(logits + lane * logits_stride, token, largest, temperature, vocab_size)
        weight = tl.where(distance <= cut, _weights(distance, least), 0)
        passed = before + tl.cumsum(weight, axis=0) > point
        place = tl.min(tl.where(passed, tl.arange(0, tile), tile - 1), axis=0)
        tl.store(chosen + lane, (part * tile + place).to(tl.int64))
    else:
        tiles = tl.arange(0, tiles_width)
        inside = tiles < num_tiles
        is_largest = tl.load(maxima + lane * num_tiles + tiles, mask=inside, other=float("-inf")) == largest
        first = tl.load(firsts + lane * num_tiles + tiles, mask=inside, other=vocab_size)
        tl.store(chosen + lane, tl.min(tl.where(is_largest, first, vocab_size), axis=0).to(tl.int64))
