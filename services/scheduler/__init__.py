"""The scheduler: one leads, wakes on NOTIFY, gives waiting jobs their CPUs and tells the nodes."""
