"""As much of JSON Schema as the schema of recipes uses. A keyword that is not known here is an error."""

TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "integer": lambda value: is_number(value) and value == int(value),
    "number": lambda value: is_number(value),
}
NOTES = {"$schema", "$comment", "title", "description", "default"}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != float("inf")


def same(left, right):
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def mistakes(schema, value, place=""):
    """What is wrong with a value, one line per mistake."""
    found = []
    for keyword, rule in schema.items():
        if keyword in NOTES:
            continue
        good = CHECKS[keyword](rule, value, schema, place)
        found += good if isinstance(good, list) else [] if good else [f"{place}: {value!r} against {keyword} {rule!r}"]
    return found


def of_number(compare):
    return lambda rule, value, *_: not is_number(value) or compare(value, rule)


def properties(rule, value, schema, place):
    if not isinstance(value, dict):
        return []
    return [
        line for key, inner in rule.items() if key in value for line in mistakes(inner, value[key], f"{place}.{key}")
    ]


def additional(rule, value, schema, place):
    if not isinstance(value, dict) or rule is True:
        return []
    others = [key for key in value if key not in schema.get("properties", {})]
    if rule is False:
        return [f"{place}.{key} is not known" for key in others]
    return [line for key in others for line in mistakes(rule, value[key], f"{place}.{key}")]


def items(rule, value, schema, place):
    if not isinstance(value, list):
        return []
    return [line for index, item in enumerate(value) for line in mistakes(rule, item, f"{place}[{index}]")]


def any_of(rule, value, schema, place):
    return any(not mistakes(part, value, place) for part in rule)


CHECKS = {
    "type": lambda rule, value, *_: any(TYPES[name](value) for name in ([rule] if isinstance(rule, str) else rule)),
    "enum": lambda rule, value, *_: any(same(value, word) for word in rule),
    "const": lambda rule, value, *_: same(value, rule),
    "minimum": of_number(lambda value, rule: value >= rule),
    "maximum": of_number(lambda value, rule: value <= rule),
    "exclusiveMinimum": of_number(lambda value, rule: value > rule),
    "exclusiveMaximum": of_number(lambda value, rule: value < rule),
    "multipleOf": of_number(lambda value, rule: value % rule == 0),
    "minItems": lambda rule, value, *_: not isinstance(value, list) or len(value) >= rule,
    "maxItems": lambda rule, value, *_: not isinstance(value, list) or len(value) <= rule,
    "required": lambda rule, value, *_: not isinstance(value, dict) or all(key in value for key in rule),
    "propertyNames": lambda rule, value, schema, place: [
        line for key in (value if isinstance(value, dict) else ()) for line in mistakes(rule, key, f"{place}.{key}")
    ],
    "properties": properties,
    "additionalProperties": additional,
    "items": items,
    "anyOf": any_of,
}
