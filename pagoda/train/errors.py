"""The one exception for a text, a setting or a checkpoint that cannot be used."""


class TrainError(Exception):
    """Its message says what is at fault, which rule it breaks, what was found and what to do."""

    def __init__(self, what: object, rule: str, value: object, remedy: str):
        super().__init__(f"{what}: {rule}, but {value}. {remedy}")
