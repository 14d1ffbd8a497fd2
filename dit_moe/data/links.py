"""Links to folders that lead back: followed, they would count the same files again and again."""

from __future__ import annotations

import os
import sys
from typing import AnyStr


def goes_on(link: AnyStr) -> bool:
    """Whether what is in a folder, maybe a link to one, is to be read: not if it leads to a folder that it lies in.

    stderr names what is left out.
    """
    if not os.path.islink(link):
        return True
    target, place = os.path.realpath(link), os.path.abspath(link)
    below_target = os.path.join(target, target[:0])
    while place != os.path.dirname(place):
        place = os.path.dirname(place)
        if os.path.join(os.path.realpath(place), target[:0]).startswith(below_target):
            shown = (os.fsdecode(link), os.fsdecode(target))
            print("warning: {} leads back to {}, which it lies in; it is left out".format(*shown), file=sys.stderr)
            return False
    return True
