"""`python -m bench.history`: the same as bench.backlog, with few and with many jobs that are over."""

import sys
from collections.abc import Sequence

from bench import scale
from bench.scale import Point, add_pairs, counts, measure_points, point_lines, schedule

WAITING = 1000


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was measured; 1 with one line when a run is void."""
    parser = scale.parser("history", __doc__)
    add_pairs(parser)
    parser.add_argument(
        "--finished", type=counts, default="0,10000000", metavar="N,…", help="jobs that are over (%(default)s)"
    )
    options = parser.parse_args(words)
    points = [Point(finished, WAITING, finished) for finished in schedule(options.finished, options.pairs)]
    return scale.run("history", options, lambda folder: measure_points(folder, points, options.jobs), point_lines)


if __name__ == "__main__":
    sys.exit(main())
