"""`python -m bench.backlog`: what a second holds, and what it takes, with few and with many jobs waiting."""

import sys
from collections.abc import Sequence

from bench import scale
from bench.scale import Point, add_pairs, counts, measure_points, point_lines, schedule


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was measured; 1 with one line when a run is void."""
    parser = scale.parser("backlog", __doc__)
    add_pairs(parser)
    parser.add_argument(
        "--waiting",
        type=counts,
        default="1000,10000,100000,1000000",
        metavar="N,…",
        help="jobs that wait (%(default)s)",
    )
    options = parser.parse_args(words)
    points = [Point(waiting, waiting, 0) for waiting in schedule(options.waiting, options.pairs)]
    return scale.run("backlog", options, lambda folder: measure_points(folder, points, options.jobs), point_lines)


if __name__ == "__main__":
    sys.exit(main())
