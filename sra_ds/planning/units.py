"""Numbers in units of their size."""

SECONDS_PER_DAY = 86_400
COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SPANS = (
    (2.0 * SECONDS_PER_DAY, SECONDS_PER_DAY, "days"), (2 * 3600.0, 3600.0, "h"), (120.0, 60.0, "min"),
    (2.0, 1.0, "s"), (0.0, 1e-3, "ms"),
)  # fmt: skip
"""From how many seconds on, seconds of the unit, its name."""


def count(number: float) -> str:
    """12,345,678 -> "12.3 M"; below 1,000 as it is."""
    for size, name in COUNTS:
        if number >= size:
            return f"{digits(number / size)} {name}"
    return f"{number:,.0f}"


def span(low: float, high: float) -> str:
    """Seconds from `low` to `high` in the unit of the latter: "2.10-2.42 ms", "3.1-3.5 days"."""
    unit, name = next((unit, name) for start, unit, name in SPANS if high >= start)
    return f"{digits(low / unit)}-{digits(high / unit)} {name}"


def digits(number: float) -> str:
    """Three that count, and all before the point: 0.123, 1.23, 12.3, 123, 1,230."""
    decimals = next((n for n, below in ((2, 10), (1, 100)) if number < below), 0)
    return f"{number:,.{decimals}f}"
