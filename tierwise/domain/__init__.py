"""What tierwise talks about: plain immutable values, no I/O, no time, no chance."""
