"""The fast path: the same functions as the reference path computes, faster; every file is one idea and can be taken off."""
