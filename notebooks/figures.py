"""The figures of notebooks 01 to 04: what they draw is computed and asserted in the notebooks.

Each is drawn for the width of a phone as well: about 640 pixels wide, with words of 10 points or more, and in greys.
"""

import functools
import textwrap

import matplotlib.pyplot as plt

WIDTH = 6.4  # inches, of 100 pixels
STYLE = {"figure.dpi": 100, "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.frameon": False}


def figure(draw):
    """Decorate a function that draws: it does so in the style of this module, and shows what it drew."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with plt.rc_context(STYLE):
            draw(*args, **kwargs)
            plt.show()

    return drawn


def sheet(height, title):
    """Axes without an axis, `WIDTH` by `height` inches, on which a unit is an inch."""
    _, axes = plt.subplots(figsize=(WIDTH, height))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.set_title(title)
    axes.axis("off")
    axes.figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - 0.35 / height)
    return axes


def box(axes, x, y, width, height, words="", **style):
    """A box with its lower left corner at x, y, and words in its middle."""
    axes.add_patch(plt.Rectangle((x, y), width, height, **{"fc": "white", "ec": "black", "lw": 1.5} | style))
    back = {"fc": "white", "ec": "none", "pad": 1.5} if "hatch" in style else None
    axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", bbox=back)


def arrow(axes, start, end, **style):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.3, **style})


# 01 ------------------------------------------------------------


@figure
def way_to_a_neuroncore():
    """From a PyTorch module to the engines that run it: what there is at each step, and what makes it."""
    axes = sheet(8.6, "From a PyTorch module to a NeuronCore")
    stages = {
        7.8: ("PyTorch module", "torch-xla runs it once\nand records lazily"),
        6.5: ("HLO: operations,\nfixed shapes and dtypes", "neuronx-cc compiles,\nfor minutes"),
        5.2: ("NEFF inside model.pt:\nplan and instructions", "NRT, the runtime,\nloads it onto a core"),
    }
    for y, (what, step) in stages.items():
        box(axes, 0.3, y, 2.7, 0.7, what, fc="0.9")
        arrow(axes, (1.65, y), (1.65, y - 0.6))
        axes.text(1.95, y - 0.32, step, va="center", fontsize=11, style="italic")
    for low, high, words in (
        (5.2, 8.5, "once, on\nany machine\nwith AWS's\npackages"),
        (4.65, 5.15, "once a\nprocess"),
        (0.4, 4.6, "every call,\non Inf2"),
    ):
        axes.plot([5.0, 5.1, 5.1, 5.0], [low, low, high, high], color="black", lw=1.3)
        axes.text(5.2, (low + high) / 2, words, va="center")
    box(axes, 0.3, 1.6, 4.6, 3.0)
    axes.text(0.42, 4.35, "NeuronCore (two on a chip)", va="center", weight="bold")
    for x, engine, work in (
        (0.45, "tensor", "matrices"),
        (1.56, "vector", "sums of\na row"),
        (2.67, "scalar", "functions of\nan element"),
        (3.78, "GPSIMD", "the rest"),
    ):
        box(axes, x, 3.1, 1.01, 0.95, fc="0.9")
        axes.text(x + 0.505, 3.85, engine, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(x + 0.505, 3.4, work, ha="center", va="center", fontsize=10)
        axes.plot([x + 0.505] * 2, [2.85, 3.1], color="black", lw=1.3)
    box(axes, 0.45, 1.75, 1.39, 0.85, "PSUM, 2 MiB:\nsums")
    box(axes, 1.99, 1.75, 2.8, 0.85, "SBUF, 24 MiB:\nwhat is worked on")
    axes.plot([0.955, 4.285], [2.85, 2.85], color="black", lw=1.3)  # what the engines and both memories share
    for x in (1.145, 3.39):
        axes.plot([x, x], [2.6, 2.85], color="black", lw=1.3)
    box(axes, 0.3, 0.4, 4.6, 0.7, "HBM, 32 GiB a chip: weights, inputs, outputs")
    arrow(axes, (3.39, 1.1), (3.39, 1.75), arrowstyle="<|-|>")


@figure
def labelled_pictures(pictures, names):
    """Eight pictures, each under its name."""
    sheet_of, axes = plt.subplots(2, 4, figsize=(WIDTH, 3.7), layout="constrained")
    for axis, picture, name in zip(axes.flat, pictures, names, strict=False):
        axis.imshow(picture)
        axis.set_title(name[:15], fontsize=12)
        axis.set_axis_off()
    sheet_of.suptitle("Held-out pictures, named by the eager model", fontsize=13)


@figure
def paid_once(times, hardware):
    """Bars: `times` has for each batch size the milliseconds of the trace and of the first three calls."""
    _, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    styles = {"trace": ("0.25", ""), "call 1": ("0.55", "//"), "call 2": ("0.8", ".."), "call 3": ("1", "")}
    for k, (name, (grey, hatch)) in enumerate(styles.items()):
        places = [i + 0.2 * (k - 1.5) for i in range(len(times))]
        heights = [ms[k] for ms in times.values()]
        axes.bar(places, heights, 0.2, color=grey, hatch=hatch, edgecolor="black", label=name)
    axes.set_xticks(range(len(times)), times)
    axes.set(yscale="log", xlabel="B (pictures a call)", ylabel=f"{hardware} time (ms)")
    axes.set_title("Paid once: the trace and the first calls")
    axes.figure.legend(loc="outside lower center", ncols=4)


# 02 ------------------------------------------------------------


@figure
def three_parts(labels, most):
    """The three parts and what passes between them: `labels` has the words for each tensor, `most` the most tokens."""
    axes = sheet(6.3, "BLIP in three parts")
    rows = {
        "vision_model": (4.9, "image graph", "pixel_values", "image_embeds"),
        "text_encoder": (3.1, "question graph", "question", "features"),
        "text_decoder": (1.3, "answer graph", "answer", "logits"),
    }
    for part, (y, role, given, returned) in rows.items():
        style = {"ls": "--", "hatch": "/"} if part == "text_decoder" else {"fc": "0.9"}
        box(axes, 2.1, y, 1.8, 0.9, f"{part}\n{role}", **style)
        axes.text(0.05, y + 0.45, labels[given], va="center")
        arrow(axes, (1.55, y + 0.45), (2.1, y + 0.45))
        axes.text(4.6, y + 0.45, labels[returned], va="center")
        arrow(axes, (3.9, y + 0.45), (4.5, y + 0.45))
    for y in (4.5, 2.7):  # from what a part returns into the next
        axes.plot([5.3, 5.3, 3.0], [y + 0.3, y, y], color="black", lw=1.3)
        arrow(axes, (3.0, y + 0.01), (3.0, y - 0.5))
    axes.plot([5.3, 5.3, 0.6], [1.25, 0.75, 0.75], color="black", lw=1.3, ls="--")
    arrow(axes, (0.6, 0.74), (0.6, 1.3), ls="--")
    axes.text(3.0, 0.35, f"generate(), in Python, chooses a token, up to {most} times", ha="center", va="center")


@figure
def nesting(title, stacks):
    """Boxes in boxes, before a trace and after it, when the module that was traced is a file.

    `stacks` is a dict of a part's name to (class names from the outside in, the index of the one that is traced)."""
    deepest = max(len(names) for names, _ in stacks.values())
    height = 0.62 * deepest + 1.0
    _, panels = plt.subplots(len(stacks), 1, figsize=(WIDTH, height * len(stacks) + 0.3), squeeze=False)
    for axes, (heading, (names, traced)) in zip(panels.flat, stacks.items(), strict=True):
        axes.set(xlim=(0, WIDTH), ylim=(0, height))
        axes.axis("off")
        for side, words in ((0.05, "before the trace"), (3.3, "after it")):
            shown = names if side < 1 else [*names[:traced], f"{heading}.pt"]
            axes.text(side, height - 0.16, f"{heading}, {words}", va="center", weight="bold", fontsize=11)
            for depth, name in enumerate(shown):
                left, low = side + 0.1 * depth, 0.1 + 0.1 * depth
                inside = {"fc": "0.88", "lw": 2.5} if depth >= traced else {}
                box(axes, left, low, 3.05 - 0.2 * depth, height - 0.42 - 0.62 * depth, **inside)
                axes.text(left + 0.1, low + height - 0.42 - 0.62 * depth - 0.25, name, va="center", fontsize=11)
    panels.flat[0].set_title(title)
    plt.subplots_adjust(left=0, right=1, bottom=0, top=0.93, hspace=0.05)


@figure
def padded_questions(questions):
    """A column for each question, a list of (token, mask): white where the mask is 1, hatched where it is 0."""
    length = len(questions[0])
    _, axes = plt.subplots(figsize=(WIDTH, 0.3 * length + 1.4), layout="constrained")
    for column, question in enumerate(questions):
        for row, (token, mask) in enumerate(question):
            style = {"fc": "white", "ec": "0.5"} if mask else {"fc": "0.85", "ec": "0.5", "hatch": "////"}
            axes.add_patch(plt.Rectangle((column, row - 0.5), 1, 1, **style))
            back = None if mask else {"fc": "white", "ec": "none", "pad": 0.6}
            axes.text(column + 0.5, row, f"{token}  {mask}", ha="center", va="center", fontsize=11, bbox=back)
    tokens = [f"{sum(mask for _, mask in question)} tokens" for question in questions]
    axes.set(xlim=(0, len(questions)), ylim=(length - 0.5, -0.5), yticks=range(length), ylabel="position")
    axes.set_xticks([i + 0.5 for i in range(len(questions))], tokens)
    axes.set_title(f"Questions padded to Q = {length}: token and mask")


@figure
def difference_by_length(lengths, without, masked, length, bound):
    """By the questions' lengths: the largest difference of each without a mask (crosses) and with one (circles)."""
    _, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    padded = [i for i, tokens in enumerate(lengths) if tokens < length]
    axes.semilogy([lengths[i] for i in padded], [without[i] for i in padded], "kx", label="eager, no mask")
    circles = [max(difference, 1e-8) for difference in masked]
    axes.semilogy(lengths, circles, "ko", fillstyle="none", label="traced, mask")
    axes.axhline(bound, color="0.4", ls="--", label=f"bound {bound:.0e}")
    axes.set(xlabel="question length (tokens)", ylabel="max |difference|", ylim=(3e-9, 100))
    axes.set_title(f"{len(lengths)} questions padded to {length} tokens, against unpadded")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(loc="outside lower center", ncols=3)


# 03 ------------------------------------------------------------


@figure
def steps_of_an_answer(words, answer_length):
    """A row for each step: what the graph gets of an answer, whose tokens are `words`."""
    steps = len(words) - 1
    _, axes = plt.subplots(figsize=(WIDTH, 0.27 * steps + 1.4), layout="constrained")
    for step in range(steps):
        for position in range(answer_length):
            real = {"fc": "white"} if position <= step else {"fc": "0.8", "hatch": "///"}
            axes.add_patch(plt.Rectangle((position - 0.5, step - 0.5), 1, 1, ec="0.6", lw=0.6, **real))
        axes.add_patch(plt.Rectangle((step - 0.5, step - 0.5), 1, 1, fill=False, lw=2.5))
    axes.set(xlim=(-0.5, answer_length - 0.5), ylim=(steps - 0.5, -0.5), xlabel="position in the padded input")
    axes.set_xticks(range(0, answer_length, 4))
    axes.set_yticks(range(steps), [f"{words[step]}  {step}" for step in range(steps)], fontsize=11)
    axes.set(ylabel="last token, and step", title="One fixed shape, one more token each step")


@figure
def masks_of_a_step(causal, padding, allowed, step):
    """Three matrices [A, A]: the causal mask, the padding mask, and both."""
    _, panels = plt.subplots(1, 3, figsize=(WIDTH, 3.1), layout="constrained", sharey=True)
    ticks = [0, 8, 16, len(causal) - 1] if len(causal) > 20 else [0, len(causal) - 1]
    for axes, mask, title in zip(panels, (causal, padding, allowed), ("causal", "padding", "both"), strict=True):
        axes.imshow(mask, cmap="gray", vmin=-0.6, vmax=1)
        axes.set(title=title, xticks=ticks, yticks=ticks)
    panels[0].set_ylabel("position")
    panels[1].set_xlabel("attended position (white: attends)")
    panels[2].annotate(
        "read here",
        (step, step),
        (8, 9),
        color="white",
        fontsize=12,
        arrowprops={"arrowstyle": "-|>", "color": "white"},
    )


@figure
def answers_by_length(counts, cut):
    """Bars: how many answers have so many new tokens; a dashed line where a fixed output of `cut` tokens ends."""
    _, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    axes.bar(range(len(counts)), counts, color="0.6", edgecolor="black")
    axes.axvline(cut + 0.5, color="black", ls="--")
    axes.text(cut + 0.8, max(counts) * 0.9, "FourTokens ends here")
    axes.set(title="One graph, answers of many lengths", xlabel="new tokens, [SEP] included", ylabel="answers")
    axes.set_xticks(range(0, len(counts), 4))


# 04 ------------------------------------------------------------


@figure
def pictures_and_answers(rows):
    """A row for each (picture, question, eager answer, compiled answer)."""
    sheet_of, panels = plt.subplots(len(rows), 2, figsize=(WIDTH, 1.25 * len(rows)), width_ratios=(1, 4.2))
    for (left, right), (picture, *lines) in zip(panels, rows, strict=True):
        left.imshow(picture)
        named = [f"{name}: {line}" for name, line in zip(("Q", "eager", "compiled"), lines, strict=True)]
        words = "\n".join(textwrap.fill(line, 52, subsequent_indent="    ") for line in named)
        right.text(0, 0.5, words, va="center", fontsize=11, linespacing=1.3)
        left.axis("off")
        right.axis("off")
    sheet_of.suptitle("Each picture with its question and the two answers", fontsize=13)
    sheet_of.subplots_adjust(left=0, right=1, bottom=0, top=0.95, wspace=0.03, hspace=0.08)


@figure
def logit_differences(differences, bound):
    """A histogram of the worst difference of each answer, on a logarithmic scale, and its bound."""
    _, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    least = 1e-8
    decades = [10 ** (k / 4) for k in range(-32, -7)]
    axes.hist([max(difference, least) for difference in differences], bins=decades, color="0.7", edgecolor="black")
    axes.axvline(bound, color="black", ls="--")
    axes.text(bound * 0.8, axes.get_ylim()[1] * 0.9, f"bound {bound:.0e}", ha="right")
    axes.set(xscale="log", xlabel="largest |compiled - eager| of an answer's logits", ylabel="answers")
    axes.set_title("Worst logit difference of each answer")
