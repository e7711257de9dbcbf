"""``rowlock doctor``: what this node and its servers are fit for. Each module looks at one thing and judges it."""
