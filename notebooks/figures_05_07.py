"""The figures of notebooks 05 to 07: what they draw is computed, and asserted, in the notebooks.

Every figure is narrow and its letters are large, so that it can be read on a telephone as well. Colours are those of
Okabe and Ito, which colour-blind people tell apart; line styles and marks differ too.
"""

import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "black"
STYLE = {"font.size": 13, "axes.titlesize": 13, "figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False}


def _axes(height, **labels):
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
        axes.set(**labels)
    return figure, axes


def operations(lengths, padded, cached):
    """Operations of one decoder step in passes through its matrices, over the answer length (lists of numbers)."""
    with plt.rc_context(STYLE):
        _, axes = _axes(3.6, xlabel="answer length A", ylabel="passes through the matrices")
        axes.set_title("Operations of one step, size of blip-vqa-base", loc="left")
        axes.plot(lengths, padded, "o-", color=ORANGE)
        axes.plot(lengths, cached, "s--", color=BLUE)
        axes.annotate("padded decoder", (lengths[3], padded[3]), (-8, 8), textcoords="offset points", ha="right")
        axes.annotate("cached decoder", (lengths[3], cached[3]), (0, 10), textcoords="offset points", ha="center")
        axes.set(yscale="log", ylim=(0.7, 100), xlim=(0, 68), xticks=lengths)
        axes.set_yticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
        axes.minorticks_off()
        plt.show()


def state(grid):
    """The lengths of the key vectors in the state, [steps, slots]: a row a step."""
    with plt.rc_context(STYLE):
        figure, axes = _axes(4.2, xlabel="slot (position in the answer)", ylabel="step")
        axes.set_title("Keys of layer 1 in the state", loc="left")
        shown = axes.imshow(grid, cmap="Greys", vmin=0, aspect="auto")
        axes.set_yticks(range(0, len(grid), 5))
        figure.colorbar(shown, label="length of the key vector")
        plt.show()


def rounding(margins, drifts):
    """The smallest margin of each answer, and how far each setting moved its logits (`drifts`: name to tensor)."""
    with plt.rc_context(STYLE):
        _, axes = _axes(4.6, xscale="log", xlabel="difference of two logits", ylabel="share of answers", ylim=(0, 1.02))
        axes.set_title("How far rounding moves logits, and how far it may", loc="left")
        looks = ((BLUE, "-"), (BLUE, "--"), (ORANGE, "-"), (ORANGE, "--"))
        for (name, values), (colour, line) in zip(drifts.items(), looks, strict=True):
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axes.plot(values.clamp(min=1e-5).sort().values, shares, line, color=colour, label=name)
        shares = [(i + 1) / len(margins) for i in range(len(margins))]
        axes.plot(margins.sort().values / 2, shares, color="black", linewidth=3, label="half the margin")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, frameon=False)
        plt.show()


def time_line(ways, device):
    """One question by several ways: the host's parts, measured (name to a row of benchmarks/host.json), then the
    device's bound in milliseconds, calculated."""
    parts = {"picture": (BLUE, ""), "tokenizer": (PURPLE, ""), "generate": (ORANGE, ""), "device": ("white", "///")}
    with plt.rc_context(STYLE):
        _, axes = _axes(3.2, xlabel="milliseconds")
        axes.set_title("One question about a JPEG of 640x480", loc="left")
        for place, ((_, row), of_device) in enumerate(zip(ways.items(), device, strict=True)):
            left = 0.0
            for part, (colour, hatch) in parts.items():
                width = of_device if part == "device" else row[part]
                label = None if place else {"device": "device, calculated"}.get(part, f"{part}, measured")
                axes.barh(place, width, left=left, color=colour, hatch=hatch, edgecolor="0.3", label=label)
                left += width
        axes.set_yticks(range(len(ways)), list(ways))
        axes.invert_yaxis()
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.25), ncols=2, frameon=False)
        plt.show()


def roofline(peak, bandwidth, published, graphs):
    """A roof of `peak` operations and `bandwidth` bytes a second, with published runs below it.

    `published` has for each name (operations a byte, operations a second reached, times the bound), `graphs` for each
    name its operations a byte, which are marked along the bottom.
    """
    with plt.rc_context(STYLE):
        _, axes = _axes(5, xscale="log", yscale="log", xlim=(0.5, 2000), ylim=(0.003, 300))
        axes.set(xlabel="operations a byte (bf16)", ylabel="TFLOPS")
        axes.set_title("A NeuronCore's roof, and AWS's published runs", loc="left")
        bend = peak / bandwidth
        axes.plot([0.5, bend, 2000], [0.5 * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black", linewidth=2)
        axes.text(4, 4.5, "waits for\nmemory", ha="right", color="0.35")
        axes.text(bend, 1.15 * peak / 1e12, "waits for arithmetic", ha="center", va="bottom", color="0.35")
        marks = zip(published.items(), ("o", "s", "^"), (BLUE, ORANGE, GREEN), strict=True)
        for (name, (intensity, reached, times)), mark, colour in marks:
            roof = min(peak, intensity * bandwidth) / 1e12
            axes.plot([intensity, intensity], [reached / 1e12, roof], ":", color=colour)
            axes.plot(intensity, reached / 1e12, mark, color=colour, markersize=8, label=f"{name}: {times:.1f} x")
        axes.legend(title="published time / bound", loc="upper left", frameon=False, fontsize=11, title_fontsize=11)
        for name, intensity in graphs.items():
            axes.plot([intensity, intensity], [0.003, 0.0045], color="black", linewidth=2)
            axes.text(intensity, 0.006, name, rotation=90, ha="center", va="bottom", fontsize=11)
        plt.show()
