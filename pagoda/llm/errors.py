"""The one exception for a model file, a request or a setting that cannot be used."""


class ModelError(Exception):
    """Something is wrong with what the user gave: its message says what, rule, value and remedy.

    what: the thing at fault, a file or a setting; rule: what must hold; value: what was found;
    remedy: what to do about it.
    """

    def __init__(self, what: object, rule: str, value: object, remedy: str):
        super().__init__(f"{what}: {rule}, but {value}. {remedy}")
        self.what, self.rule, self.value, self.remedy = what, rule, value, remedy
