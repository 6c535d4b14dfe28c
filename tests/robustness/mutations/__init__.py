"""Change files in hostile ways, a module a kind of file. Every change is drawn from a seed."""
