"""HTTP in and out: the only place where a request's JSON is looked at, and where a job becomes JSON."""
