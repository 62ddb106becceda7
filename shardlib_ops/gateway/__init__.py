"""The HTTP gateway: statements of programs in other languages, routed and fenced as those of Python are."""
