"""What the commands print of a check: a row a graph, then findings and notes."""

from inf2.cost import count_cost


def print_checks(checked, parts):
    """Print a row for each of `checked` (names and `Checked`, as they come), then what was found: the exit status.

    `parts` has for each name the module and one call's inputs.
    """
    print(
        f"{'graph':<26}{'operators':>10}{'inputs':>8}{'state':>7}{'weights':>12}{'GFLOP':>9}{'difference':>12}  found"
    )
    findings, notes = [], {}
    for name, result in checked:
        findings += [f"{name}: {finding}" for finding in result.findings]
        notes |= dict.fromkeys(result.notes)
        print(f"{name:<26}{_row_of(result, parts[name])}", flush=True)
    for line in findings:
        print(f"FOUND {line}")
    for line in notes:
        print(f"note  {line}")
    print(f"{len(parts)} graphs checked, {len(findings)} findings. Nothing was compiled: neuronx-cc has the last word.")
    return int(bool(findings))


def _row_of(checked, part):
    if checked.lowered is None:
        return f"{'not lowered':>10}{'':>8}{'':>7}{'':>12}{'':>9}{'':>11}  {len(checked.findings)}"
    lowered = checked.lowered
    kinds = [parameter.kind for parameter in lowered.parameters]
    weights = sum(parameter.nbytes for parameter in lowered.parameters if parameter.kind == "weight") / 1e6
    return (
        f"{sum(lowered.operators.values()):>10,}{kinds.count('input'):>8}{kinds.count('state'):>7}"
        f"{weights:>9.1f} MB{_gflop_of(part):>9}{checked.difference:>12.0e}"
        f"  {len(checked.findings) or 'none'}"
    )


def _gflop_of(part):
    """What a call takes, in GFLOP; a dash where an operator cannot be counted, which is no fault of the graph."""
    try:
        return f"{count_cost(*part).flops / 1e9:.2f}"
    except ValueError:
        return "-"
