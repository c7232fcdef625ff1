def memory_of(*a):
    return None


def add_rows(*a):
    pass
