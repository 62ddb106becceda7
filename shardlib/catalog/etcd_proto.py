"""The part of etcd's v3 messages that is used, declared at run time: no generated files.

File and package have names of our own, so that another etcd client in the same process can declare the
originals; on the wire only field numbers count, and the paths of the methods stay those of etcd. Fields that
are not listed are skipped by protobuf. Source of the numbers: etcd's `rpc.proto`, `kv.proto` and
`auth.proto`, release 3.5.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["COMPARE_CREATE", "COMPARE_EQUAL", "COMPARE_MOD", "method_path", "new", "parser"]

_PACKAGE: Final = "shardlib.etcdserverpb"
COMPARE_EQUAL: Final = 0
COMPARE_CREATE: Final = 1
COMPARE_MOD: Final = 2

# message: {field: (number, type)}; a type in capitals is a message, `*` in front means repeated, `|` a oneof.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "KeyValue": {
        "key": (1, "bytes"),
        "create_revision": (2, "int64"),
        "mod_revision": (3, "int64"),
        "value": (5, "bytes"),
        "lease": (6, "int64"),
    },
    "ResponseHeader": {"revision": (3, "int64")},
    "RangeRequest": {
        "key": (1, "bytes"),
        "range_end": (2, "bytes"),
        "limit": (3, "int64"),
        "keys_only": (8, "bool"),
    },
    "RangeResponse": {"header": (1, "ResponseHeader"), "kvs": (2, "*KeyValue"), "more": (3, "bool")},
    "PutRequest": {"key": (1, "bytes"), "value": (2, "bytes"), "lease": (3, "int64")},
    "PutResponse": {"header": (1, "ResponseHeader")},
    "DeleteRangeRequest": {"key": (1, "bytes"), "range_end": (2, "bytes")},
    "DeleteRangeResponse": {"header": (1, "ResponseHeader"), "deleted": (2, "int64")},
    "RequestOp": {
        "request_range": (1, "|RangeRequest"),
        "request_put": (2, "|PutRequest"),
        "request_delete_range": (3, "|DeleteRangeRequest"),
    },
    "ResponseOp": {
        "response_range": (1, "|RangeResponse"),
        "response_put": (2, "|PutResponse"),
        "response_delete_range": (3, "|DeleteRangeResponse"),
    },
    "Compare": {
        "result": (1, "int32"),
        "target": (2, "int32"),
        "key": (3, "bytes"),
        "create_revision": (5, "|int64"),
        "mod_revision": (6, "|int64"),
    },
    "TxnRequest": {"compare": (1, "*Compare"), "success": (2, "*RequestOp"), "failure": (3, "*RequestOp")},
    "TxnResponse": {
        "header": (1, "ResponseHeader"),
        "succeeded": (2, "bool"),
        "responses": (3, "*ResponseOp"),
    },
    "WatchCreateRequest": {
        "key": (1, "bytes"),
        "range_end": (2, "bytes"),
        "start_revision": (3, "int64"),
        "progress_notify": (4, "bool"),
    },
    "WatchProgressRequest": {},
    "WatchRequest": {
        "create_request": (1, "|WatchCreateRequest"),
        "progress_request": (3, "|WatchProgressRequest"),
    },
    "Event": {"type": (1, "int32"), "kv": (2, "KeyValue")},
    "WatchResponse": {
        "header": (1, "ResponseHeader"),
        "watch_id": (2, "int64"),
        "created": (3, "bool"),
        "canceled": (4, "bool"),
        "compact_revision": (5, "int64"),
        "cancel_reason": (6, "string"),
        "events": (11, "*Event"),
    },
    "LeaseGrantRequest": {"TTL": (1, "int64"), "ID": (2, "int64")},
    "LeaseGrantResponse": {"header": (1, "ResponseHeader"), "ID": (2, "int64"), "TTL": (3, "int64")},
    "LeaseKeepAliveRequest": {"ID": (1, "int64")},
    "LeaseKeepAliveResponse": {"header": (1, "ResponseHeader"), "ID": (2, "int64"), "TTL": (3, "int64")},
    "LeaseRevokeRequest": {"ID": (1, "int64")},
    "LeaseRevokeResponse": {"header": (1, "ResponseHeader")},
    "AuthenticateRequest": {"name": (1, "string"), "password": (2, "string")},
    "AuthenticateResponse": {"header": (1, "ResponseHeader"), "token": (2, "string")},
}

_SERVICES: Final = {
    "Range": "KV",
    "DeleteRange": "KV",
    "Txn": "KV",
    "Watch": "Watch",
    "LeaseGrant": "Lease",
    "LeaseKeepAlive": "Lease",
    "LeaseRevoke": "Lease",
    "Authenticate": "Auth",
}


def _declare() -> dict[str, Any]:
    field_type = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "bytes": field_type.TYPE_BYTES,
        "string": field_type.TYPE_STRING,
        "bool": field_type.TYPE_BOOL,
        "int64": field_type.TYPE_INT64,
        "int32": field_type.TYPE_INT32,  # an enum has the same bytes
    }
    file = descriptor_pb2.FileDescriptorProto(name="shardlib_etcd.proto", package=_PACKAGE, syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            bare = kind.lstrip("*|")
            field = message.field.add(
                name=name,
                number=number,
                label=field_type.LABEL_REPEATED if kind[0] == "*" else field_type.LABEL_OPTIONAL,
                type=scalars.get(bare, field_type.TYPE_MESSAGE),
            )
            if bare not in scalars:
                field.type_name = f".{_PACKAGE}.{bare}"
            if kind[0] == "|":
                if not message.oneof_decl:
                    message.oneof_decl.add(name="choice")
                field.oneof_index = 0
    # A pool of our own: nothing of it can clash with what else the process declares.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES: Final = _declare()


def new(name: str, /, **fields: Any) -> Any:
    """A message of that name, such as `RangeRequest`."""
    return _CLASSES[name](**fields)


def parser(name: str) -> Any:
    """The function that reads a message of that name from bytes."""
    return _CLASSES[name].FromString


def method_path(method: str) -> str:
    """The gRPC path of a method: `/etcdserverpb.KV/Range`."""
    return f"/etcdserverpb.{_SERVICES[method]}/{method}"
