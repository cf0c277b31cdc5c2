"""What a work-horse asks of its system."""

import resource

from workers.horse import allow_files


def test_it_may_have_as_many_files_open_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        allow_files()
        raised, same = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
    assert same == hard
