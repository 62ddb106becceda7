"""What PostgreSQL's functions do to rows: names of aggregates, and of functions of one row."""

from __future__ import annotations

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import AbstractTextClause, ClauseElement, ColumnClause
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["AGGREGATES", "SCALARS", "calls_the_unknown"]

_AGGREGATES = """
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp
    cume_dist dense_rank every grouping json_agg json_agg_strict json_arrayagg json_object_agg
    json_objectagg jsonb_agg jsonb_object_agg max min mode percent_rank percentile_cont percentile_disc
    range_agg range_intersect_agg rank regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope
    regr_sxx regr_sxy regr_syy stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance xmlagg
"""

_SCALARS = """
    abs acos age array_append array_cat array_length array_position array_prepend array_remove array_replace
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
    to_date to_hex to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector transaction_timestamp
    translate trim trunc ts_headline ts_rank ts_rank_cd unistr upper user uuid_generate_v4 uuidv4 uuidv7
    websearch_to_tsquery width_bucket
"""

AGGREGATES = frozenset(_AGGREGATES.split())
"""Aggregate functions of PostgreSQL 18."""

SCALARS = frozenset(_SCALARS.split())
"""Functions of one row, of PostgreSQL and its usual extensions. Any other function may be an aggregate."""

_WITHOUT_TABLES = """
    current_database current_schema current_schemas current_setting generate_series generate_subscripts
    json_array_elements json_array_elements_text json_each json_each_text json_object_keys json_to_record
    json_to_recordset jsonb_array_elements jsonb_array_elements_text jsonb_each jsonb_each_text jsonb_object_keys
    jsonb_to_record jsonb_to_recordset regexp_matches regexp_split_to_table set_config string_to_table to_regclass
    txid_current unnest version
"""

_ROWS = frozenset(_WITHOUT_TABLES.split())
"""Functions of PostgreSQL, of a server or of rows made from their arguments, that read no table of the user's."""


def calls_the_unknown(statement: ClauseElement) -> bool:
    """Whether a statement without tables calls a function that is not PostgreSQL's, or holds text that may call one."""
    for element in visitors.iterate(statement):
        if isinstance(element, FunctionElement):
            name = str(getattr(element, "name", "")).lower()
            if name not in SCALARS and name not in AGGREGATES and name not in _ROWS and not name.startswith("pg_"):
                return True
        elif isinstance(element, AbstractTextClause):
            if "(" in str(element):
                return True
        elif isinstance(element, ColumnClause) and element.is_literal and "(" in element.name:
            return True
    return False
