"""The Triton kernels; `dispatch` launches them.

Images are channels last: (row, pixel, channel). Kernels compute in float32 and write in the precision of the inputs. Partial
sums of several programs are stored and added in a fixed order, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

# Triton compiles a kernel for each combination of its constants and of the properties of its integers. So there are few
# constants, and it does not specialize on integers that do not concern alignment.


# --- group norm: statistics of parts of a group's pixels, then of the group ------------------------------------------


@triton.jit(do_not_specialize=["pixels", "parts", "width"])
def group_moments_kernel(
    x, means, squares, x_row, x_pixel, pixels, channels, parts, width, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, for each (row, group) and part of the pixels."""
    place, part = tl.program_id(0), tl.program_id(1)
    row, group = place // GROUPS, place % GROUPS
    channel, pixel = group * width + tl.arange(0, WIDTH), part * PIXELS + tl.arange(0, PIXELS)
    here = (tl.arange(0, WIDTH) < width)[None, :] & (pixel < pixels)[:, None]
    value = tl.load(x + row * x_row + pixel[:, None] * x_pixel + channel[None, :], mask=here, other=0.0).to(tl.float32)
    count = tl.minimum(PIXELS, pixels - part * PIXELS) * width
    mean = tl.sum(tl.sum(value, axis=1), axis=0) / count
    away = tl.where(here, value - mean, 0.0)
    tl.store(means + place * parts + part, mean)
    tl.store(squares + place * parts + part, tl.sum(tl.sum(away * away, axis=1), axis=0))


@triton.jit(do_not_specialize=["pixels", "parts", "width", "silu"])
def group_norm_kernel(
    x, weight, bias, means, squares, mean_out, rstd_out, y, x_row, x_pixel, pixels, channels, parts, width, eps, silu,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = SiLU?(GroupNorm(x)); the parts' moments are combined as in Chan, Golub and LeVeque (1979)."""
    place, part = tl.program_id(0), tl.program_id(1)
    row, group = place // GROUPS, place % GROUPS
    each = tl.arange(0, PARTS)
    known = each < parts
    counts = tl.where(known, tl.minimum(PIXELS, pixels - each * PIXELS) * width, 0).to(tl.float32)
    part_means = tl.load(means + place * parts + each, mask=known, other=0.0)
    part_squares = tl.load(squares + place * parts + each, mask=known, other=0.0)
    total = pixels * width
    mean = tl.sum(counts * part_means, axis=0) / total
    square = tl.sum(part_squares + counts * (part_means - mean) * (part_means - mean), axis=0)
    rstd = 1.0 / tl.sqrt(square / total + eps)
    if part == 0:
        tl.store(mean_out + place, mean)
        tl.store(rstd_out + place, rstd)
    inside = tl.arange(0, WIDTH) < width
    channel, pixel = group * width + tl.arange(0, WIDTH), part * PIXELS + tl.arange(0, PIXELS)
    here = inside[None, :] & (pixel < pixels)[:, None]
    value = tl.load(x + row * x_row + pixel[:, None] * x_pixel + channel[None, :], mask=here, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = (value - mean) * rstd * scale + offset
    if silu:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + (row * pixels + pixel[:, None]) * channels + channel[None, :], value.to(y.dtype.element_ty), mask=here)


@triton.jit
def scaled_gradient(
    x, weight, bias, gradient, mean, rstd, row, channel, pixel, inside, here, x_row, x_pixel, g_row, g_pixel, silu,
):  # fmt: skip
    """The normalised values of a tile, and the gradient of them times their weight."""
    value = tl.load(x + row * x_row + pixel[:, None] * x_pixel + channel[None, :], mask=here, other=0.0).to(tl.float32)
    normal = tl.where(here, (value - mean) * rstd, 0.0)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    given = tl.load(gradient + row * g_row + pixel[:, None] * g_pixel + channel[None, :], mask=here, other=0.0).to(tl.float32)
    if silu:
        z = normal * scale + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        given = given * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return normal, given * scale


@triton.jit(do_not_specialize=["pixels", "parts", "width", "silu"])
def group_sums_kernel(
    x, weight, bias, gradient, mean_in, rstd_in, plain, along, x_row, x_pixel, g_row, g_pixel, pixels, channels, parts,
    width, silu, GROUPS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over a group's part of the gradient, and of it times the normalised values."""
    place, part = tl.program_id(0), tl.program_id(1)
    row, group = place // GROUPS, place % GROUPS
    inside = tl.arange(0, WIDTH) < width
    channel, pixel = group * width + tl.arange(0, WIDTH), part * PIXELS + tl.arange(0, PIXELS)
    here = inside[None, :] & (pixel < pixels)[:, None]
    mean, rstd = tl.load(mean_in + place), tl.load(rstd_in + place)
    normal, given = scaled_gradient(
        x, weight, bias, gradient, mean, rstd, row, channel, pixel, inside, here, x_row, x_pixel, g_row, g_pixel, silu,
    )  # fmt: skip
    tl.store(plain + place * parts + part, tl.sum(tl.sum(given, axis=1), axis=0))
    tl.store(along + place * parts + part, tl.sum(tl.sum(given * normal, axis=1), axis=0))


@triton.jit(do_not_specialize=["pixels", "parts", "width", "silu", "skipped"])
def group_norm_backward_kernel(
    x, weight, bias, gradient, skip, mean_in, rstd_in, plain, along, out, x_row, x_pixel, g_row, g_pixel, s_row, s_pixel,
    pixels, channels, parts, width, silu, skipped, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of x, plus `skip`."""
    place, part = tl.program_id(0), tl.program_id(1)
    row, group = place // GROUPS, place % GROUPS
    each = tl.arange(0, PARTS)
    sum_plain = tl.sum(tl.load(plain + place * parts + each, mask=each < parts, other=0.0), axis=0)
    sum_along = tl.sum(tl.load(along + place * parts + each, mask=each < parts, other=0.0), axis=0)
    inside = tl.arange(0, WIDTH) < width
    channel, pixel = group * width + tl.arange(0, WIDTH), part * PIXELS + tl.arange(0, PIXELS)
    here = inside[None, :] & (pixel < pixels)[:, None]
    mean, rstd = tl.load(mean_in + place), tl.load(rstd_in + place)
    normal, given = scaled_gradient(
        x, weight, bias, gradient, mean, rstd, row, channel, pixel, inside, here, x_row, x_pixel, g_row, g_pixel, silu,
    )  # fmt: skip
    value = rstd * (given - (sum_plain + normal * sum_along) / (pixels * width))
    if skipped:
        beside = skip + row * s_row + pixel[:, None] * s_pixel + channel[None, :]
        value += tl.load(beside, mask=here, other=0.0).to(tl.float32)
    tl.store(out + (row * pixels + pixel[:, None]) * channels + channel[None, :], value.to(out.dtype.element_ty), mask=here)


# --- layer norm of a sum ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["summed"])
def layer_norm_kernel(x, more, weight, bias, total, y, mean_out, rstd_out, channels, eps, summed, WIDTH: tl.constexpr):
    """total = x + more, y = LayerNorm(total); a program for each token."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    here = channel < channels
    value = tl.load(x + row * channels + channel, mask=here, other=0.0).to(tl.float32)
    if summed:
        value += tl.load(more + row * channels + channel, mask=here, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * channels + channel, value, mask=here)
        value = value.to(tl.float32)  # rounded, as the backward pass reads it
    mean = tl.sum(value, axis=0) / channels
    away = tl.where(here, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(away * away, axis=0) / channels + eps)
    scale = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * channels + channel, (away * rstd * scale + offset).to(y.dtype.element_ty), mask=here)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit(do_not_specialize=["skipped"])
def layer_norm_backward_kernel(total, gradient, skip, weight, mean_in, rstd_in, out, channels, skipped, WIDTH: tl.constexpr):
    """The gradient of the sum by its norm, plus `skip`."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    here = channel < channels
    mean, rstd = tl.load(mean_in + row), tl.load(rstd_in + row)
    value = tl.load(total + row * channels + channel, mask=here, other=0.0).to(tl.float32)
    normal = tl.where(here, (value - mean) * rstd, 0.0)
    scale = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * channels + channel, mask=here, other=0.0).to(tl.float32) * scale
    plain, along = tl.sum(given, axis=0) / channels, tl.sum(given * normal, axis=0) / channels
    result = rstd * (given - plain - normal * along)
    if skipped:
        result += tl.load(skip + row * channels + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * channels + channel, result.to(out.dtype.element_ty), mask=here)


# --- element by element ----------------------------------------------------------------------------------------------


@triton.jit
def geglu_kernel(halves, y, width, WIDTH: tl.constexpr):
    """y = values x GELU(gates); values and gates lie side by side in a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = column < width
    value = tl.load(halves + row * 2 * width + column, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(halves + row * 2 * width + width + column, mask=here, other=0.0).to(tl.float32)
    result = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=here)


@triton.jit
def geglu_backward_kernel(halves, gradient, out, width, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = column < width
    value = tl.load(halves + row * 2 * width + column, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(halves + row * 2 * width + width + column, mask=here, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * width + column, mask=here, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # of a standard normal variable, the share below the gate
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(out + row * 2 * width + column, (given * gate * normal).to(out.dtype.element_ty), mask=here)
    for_gate = (given * value * (normal + gate * density)).to(out.dtype.element_ty)
    tl.store(out + row * 2 * width + width + column, for_gate, mask=here)


# --- linear layers with a LoRA: up to three that read the same input -------------------------------------------------


@triton.jit(do_not_specialize=["rows", "biased"])
def lora_kernel(
    x, y0, y1, y2, low0, low1, low2, w0, w1, w2, b0, b1, b2, down0, down1, down2, up0, up1, up2, scale0, scale1, scale2,
    rows, outs, ins, biased, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    INS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """low = x A^T, y = x W^T + b + scale low B^T. x (rows, ins), W (outs, ins), A (RANK, ins), B (outs, RANK)."""
    which = tl.program_id(1)
    y, low, w, b, down, up, scale = y0, low0, w0, b0, down0, up0, scale0
    if which == 1:
        y, low, w, b, down, up, scale = y1, low1, w1, b1, down1, up1, scale1
    if which == 2:
        y, low, w, b, down, up, scale = y2, low2, w2, b2, down2, up2, scale2
    across = tl.cdiv(outs, OUTS)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    row, out, inner, rank = i * ROWS + tl.arange(0, ROWS), j * OUTS + tl.arange(0, OUTS), tl.arange(0, INS), tl.arange(0, RANKS)
    x_at = x + row[:, None] * ins + inner[None, :]
    w_at = w + out[None, :] * ins + inner[:, None]
    down_at = down + rank[None, :] * ins + inner[:, None]
    total, change = tl.zeros((ROWS, OUTS), tl.float32), tl.zeros((ROWS, RANKS), tl.float32)
    for k in range(tl.cdiv(ins, INS)):
        left = (inner < ins - k * INS) | EVEN
        a = tl.load(x_at, mask=(row < rows)[:, None] & left[None, :], other=0.0)
        total = tl.dot(a, tl.load(w_at, mask=(out < outs)[None, :] & left[:, None], other=0.0), total)
        change = tl.dot(a, tl.load(down_at, mask=(rank < RANK)[None, :] & left[:, None], other=0.0), change)
        x_at += INS
        w_at += INS
        down_at += INS
    changed = change.to(x.dtype.element_ty)
    up_tile = tl.load(up + out[None, :] * RANK + rank[:, None], mask=(out < outs)[None, :] & (rank < RANK)[:, None], other=0.0)
    total += scale * tl.dot(changed, up_tile)
    if biased:
        total += tl.load(b + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (out < outs)[None, :]
    tl.store(y + row[:, None] * outs + out[None, :], total.to(x.dtype.element_ty), mask=inside)
    if j == 0:
        tl.store(low + row[:, None] * RANK + rank[None, :], changed, mask=(row < rows)[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["rows", "count"])
def lora_input_gradient_kernel(
    g0, g1, g2, out, low0, low1, low2, w0, w1, w2, down0, down1, down2, up0, up1, up2, scale0, scale1, scale2,
    rows, outs, ins, count, FOR_INPUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr, INS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """low = scale g B of each layer; with FOR_INPUT also out = the sum of g W + low A over the layers. g (rows, outs)."""
    across = tl.cdiv(ins, INS) if FOR_INPUT else 1
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    row, inner, outer, rank = (
        i * ROWS + tl.arange(0, ROWS),
        j * INS + tl.arange(0, INS),
        tl.arange(0, OUTS),
        tl.arange(0, RANKS),
    )
    total = tl.zeros((ROWS, INS), tl.float32)
    for which in range(count):
        g, low, w, down, up, scale = g0, low0, w0, down0, up0, scale0
        if which == 1:
            g, low, w, down, up, scale = g1, low1, w1, down1, up1, scale1
        if which == 2:
            g, low, w, down, up, scale = g2, low2, w2, down2, up2, scale2
        change = tl.zeros((ROWS, RANKS), tl.float32)
        g_at = g + row[:, None] * outs + outer[None, :]
        w_at = w + outer[:, None] * ins + inner[None, :]
        up_at = up + outer[:, None] * RANK + rank[None, :]
        for k in range(tl.cdiv(outs, OUTS)):
            left = (outer < outs - k * OUTS) | EVEN
            a = tl.load(g_at, mask=(row < rows)[:, None] & left[None, :], other=0.0)
            if FOR_INPUT:
                total = tl.dot(a, tl.load(w_at, mask=left[:, None] & (inner < ins)[None, :], other=0.0), total)
                w_at += OUTS * ins
            change = tl.dot(a, tl.load(up_at, mask=left[:, None] & (rank < RANK)[None, :], other=0.0), change)
            g_at += OUTS
            up_at += OUTS * RANK
        changed = (change * scale).to(g.dtype.element_ty)
        if FOR_INPUT:
            down_at = down + rank[:, None] * ins + inner[None, :]
            total = tl.dot(changed, tl.load(down_at, mask=(rank < RANK)[:, None] & (inner < ins)[None, :], other=0.0), total)
        if j == 0:
            tl.store(low + row[:, None] * RANK + rank[None, :], changed, mask=(row < rows)[:, None] & (rank < RANK)[None, :])
    if FOR_INPUT:
        inside = (row < rows)[:, None] & (inner < ins)[None, :]
        tl.store(out + row[:, None] * ins + inner[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "share", "parts"])
def lora_factor_gradient_kernel(
    x, g0, g1, g2, low0, low1, low2, back0, back1, back2, down0, down1, down2, up0, up1, up2, scale0, scale1, scale2,
    partials, counters, rows, outs, ins, share, parts, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of A (RANK, ins): back^T x, and of B (outs, RANK): scale g^T low, in float32.

    Many rows are split over several programs, `share` each; the last one to finish adds up all `partials` in order.
    counters: zero for each block of columns, and zero again afterwards
    """
    block, which, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, low, back, down, up, scale = g0, low0, back0, down0, up0, scale0
    if which == 1:
        g, low, back, down, up, scale = g1, low1, back1, down1, up1, scale1
    if which == 2:
        g, low, back, down, up, scale = g2, low2, back2, down2, up2, scale2
    of_down = tl.cdiv(ins, WIDE)
    left, right, out = back, x, down
    if block >= of_down:
        left, right, out = low, g, up
    width, first = tl.where(block < of_down, ins, outs), tl.where(block < of_down, block, block - of_down)
    by_rank, by_column = tl.where(block < of_down, ins, 1), tl.where(block < of_down, 1, RANK)
    column, rank = first * WIDE + tl.arange(0, WIDE), tl.arange(0, RANKS)
    total = tl.zeros((RANKS, WIDE), tl.float32)
    end = tl.minimum(rows, (part + 1) * share)
    for start in range(part * share, end, ROWS):
        row = start + tl.arange(0, ROWS)
        a = tl.load(left + row[None, :] * RANK + rank[:, None], mask=(row < end)[None, :] & (rank < RANK)[:, None], other=0.0)
        at = right + row[:, None].to(tl.int64) * width + column[None, :]
        total = tl.dot(a, tl.load(at, mask=(row < end)[:, None] & (column < width)[None, :], other=0.0), total)
    last = parts == 1
    if parts > 1:
        slot = which * tl.num_programs(0) + block
        tile = partials + slot * parts * RANKS * WIDE + rank[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
        tl.store(tile + part * RANKS * WIDE, total)
        tl.debug_barrier()  # all of it is stored before this program counts itself as done
        last = tl.atomic_add(counters + slot, 1, sem="acq_rel") == parts - 1
        if last:
            total = tl.zeros((RANKS, WIDE), tl.float32)
            for one in range(parts):
                total += tl.load(tile + one * RANKS * WIDE, cache_modifier=".cg")
            tl.store(counters + slot, 0)
    if last:
        place = out + rank[:, None] * by_rank + column[None, :] * by_column
        inside = (rank < RANK)[:, None] & (column < width)[None, :]
        total = total * tl.where(block < of_down, 1.0, scale) + tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
