"""What PostgreSQL's functions do to rows: names of aggregates, and of functions of one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import AbstractTextClause, ClauseElement, ColumnClause
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["AGGREGATES", "calls_of", "known"]

_AGGREGATES = """
    aggregate_strings any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp
    cume_dist dense_rank every grouping json_agg json_agg_strict json_arrayagg json_object_agg
    json_objectagg jsonb_agg jsonb_object_agg max min mode percent_rank percentile_cont percentile_disc
    range_agg range_intersect_agg rank regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope
    regr_sxx regr_sxy regr_syy stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance xmlagg
"""

_SCALARS = """
    abbrev abs acos age array_append array_cat array_length array_position array_prepend array_remove array_replace
    array_to_json array_to_string ascii asin atan atan2 bit_length btrim cardinality cast cbrt ceil ceiling
    char_length clock_timestamp coalesce concat concat_ws convert_from convert_to cos current_date
    current_time current_timestamp current_user date date_bin date_part date_trunc decode degrees div encode
    exp extract factorial floor format gcd gen_random_uuid greatest initcap isfinite json_array_length
    json_build_array json_build_object json_extract_path json_extract_path_text json_typeof
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_extract_path jsonb_extract_path_text
    jsonb_path_exists jsonb_path_query_array jsonb_path_query_first jsonb_set jsonb_strip_nulls jsonb_typeof
    justify_days justify_hours justify_interval lcm least left length ln localtime localtimestamp log log10
    lower lpad ltrim make_date make_interval make_time make_timestamp make_timestamptz md5 mod now nullif
    num_nonnulls num_nulls octet_length overlay phraseto_tsquery pi plainto_tsquery position pow power
    quote_ident quote_literal radians random regexp_count regexp_like regexp_match regexp_replace
    regexp_split_to_array regexp_substr repeat replace reverse right round row row_to_json rpad rtrim
    session_user setweight sha224 sha256 sha384 sha512 sign similarity sin split_part sqrt starts_with
    statement_timestamp string_to_array strpos substr substring tan timeofday timezone to_ascii to_char
    system bernoulli to_date to_hex to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector transaction_timestamp
    translate trim trunc ts_headline ts_rank ts_rank_cd unistr upper user uuid_generate_v4 uuidv4 uuidv7
    websearch_to_tsquery width_bucket

    array_dims array_fill array_lower array_ndims array_positions array_reverse array_sample array_shuffle array_sort
    array_to_tsvector array_upper bit_count bool broadcast casefold char chr cosh cotd crc32 crc32c cube currval
    daterange datemultirange enum_first enum_last enum_range erf erfc family float4 float8 gamma get_bit get_byte host
    hostmask inet_merge inet_same_family int2 int4 int4range int8 int8range interval is_normalized isempty json
    json_object json_scalar json_serialize json_strip_nulls jsonb jsonb_insert jsonb_object jsonb_path_match
    jsonb_path_query_array_tz jsonb_pretty justify_days lastval lower_inc lower_inf macaddr8_set7bit makeaclitem
    masklen min_scale multirange netmask network nextval normalize now numeric numnode numrange overlaps querytree
    quote_nullable random_normal range_merge regexp_instr rollup grouping_sets scale set_bit set_byte sind sinh strip
    suffix tand tanh text time timestamp timestamptz trim_array trim_scale ts_delete ts_filter ts_rewrite
    tsquery_phrase tsrange tstzrange tsvector_to_array upper_inc upper_inf uuid uuid_extract_timestamp
    uuid_extract_version uuid_generate_v1 uuid_generate_v3 uuid_generate_v5 varchar xmlconcat xmlelement xmlforest

    akeys avals citext crypt delete digest dmetaphone earth_distance exist gen_salt hmac hstore levenshtein
    levenshtein_less_equal ll_to_earth metaphone nlevel show_trgm skeys soundex strict_word_similarity subltree
    subpath svals text2ltree unaccent word_similarity

    all any array distinct exists json_exists json_populate_record json_populate_recordset json_query json_table
    json_value jsonb_path_query jsonb_populate_record jsonb_populate_recordset setval some xpath

    cume_dist dense_rank first_value lag last_value lead next_value nth_value ntile percent_rank rank row_number
"""

AGGREGATES = frozenset(_AGGREGATES.split())
"""Aggregate functions of PostgreSQL 18."""

SCALARS = frozenset(_SCALARS.split())
"""Functions of one row, of PostgreSQL and its usual extensions, and of windows, which need OVER."""

_WITHOUT_TABLES = """
    current_database current_schema current_schemas current_setting generate_series generate_subscripts
    json_array_elements json_array_elements_text json_each json_each_text json_object_keys json_to_record
    json_to_recordset jsonb_array_elements jsonb_array_elements_text jsonb_each jsonb_each_text jsonb_object_keys
    jsonb_to_record jsonb_to_recordset regexp_matches regexp_split_to_table set_config string_to_table to_regclass
    txid_current unnest version
"""

_ROWS = frozenset(_WITHOUT_TABLES.split())
"""Functions of PostgreSQL, of a server or of rows made from their arguments, that read no table of the user's."""


_NO_CALLS = """
    all and any array as between bit by case cast char character decimal else exists filter float ilike in interval is
    like not numeric on operator or over precision row some then time timestamp using varbit varchar varying when where
    within zone
"""
_BEFORE_PARENTHESES = frozenset(_NO_CALLS.split())
_CALL = re.compile(r"""([\w$."]+)\s*\(""")


def known(function: FunctionElement[Any]) -> bool:
    """Whether a function is PostgreSQL's own, or of its usual extensions: what it reads is in its arguments."""
    if any(name != "pg_catalog" for name in getattr(function, "packagenames", ())):
        return False
    return _is_known(str(getattr(function, "name", "")))


def _is_known(name: str) -> bool:
    name = name.lower()
    return name in SCALARS or name in AGGREGATES or name in _ROWS or name.startswith("pg_")


def calls_of(statements: Iterable[ClauseElement]) -> tuple[str, ...]:
    """The functions, unique, that statements call and that are not known: they may be aggregates, or read any table."""
    found: dict[str, None] = {}
    for element in chain.from_iterable(map(visitors.iterate, statements)):
        if isinstance(element, FunctionElement):
            if not known(element):
                names = (*getattr(element, "packagenames", ()), getattr(element, "name", type(element).__name__))
                found[".".join(map(str, names))] = None
        elif isinstance(element, AbstractTextClause):
            found.update(dict.fromkeys(_calls_in(str(element))))
        elif isinstance(element, ColumnClause) and element.is_literal:
            found.update(dict.fromkeys(_calls_in(element.name)))
    return tuple(found)


def _calls_in(text: str) -> Iterator[str]:
    for name in _CALL.findall(text):
        if name.lower() not in _BEFORE_PARENTHESES and not _is_known(name.removeprefix("pg_catalog.")):
            yield name
