-- Beside pgbench's tables. Variables: customers, documents (1 MB each), large_objects (100 kB each).
CREATE SCHEMA extra AUTHORIZATION app_owner;
CREATE EXTENSION pg_stat_statements;
CREATE EXTENSION pg_trgm;
CREATE EXTENSION hstore;
CREATE COLLATION de_phonebook (provider = icu, locale = 'de-u-co-phonebk');
CREATE COLLATION ignore_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE INDEX pgbench_accounts_abalance ON pgbench_accounts (abalance);

-- Row security that would hide most rows from a dump that obeys it.
CREATE TABLE customer (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE de_phonebook,
    email text COLLATE ignore_case UNIQUE,
    tags hstore,
    region text
);
INSERT INTO customer (name, email, tags, region)
SELECT (ARRAY['Müller', 'Mueller', 'Ärger', 'Zoë', 'O''Neil'])[1 + i % 5] || ' ' || i,
       'User' || i || '@example.org', hstore('k' || i % 7, i::text), (ARRAY['eu', 'us', 'apac'])[1 + i % 3]
FROM generate_series(1, :customers) i;
CREATE INDEX customer_name_trigrams ON customer USING gin (name gin_trgm_ops);
ALTER TABLE customer ENABLE ROW LEVEL SECURITY;
ALTER TABLE customer FORCE ROW LEVEL SECURITY;
CREATE POLICY only_europe ON customer FOR SELECT TO app_reader USING (region = 'eu');
GRANT SELECT ON customer TO app_reader;
GRANT INSERT, UPDATE (name) ON customer TO app_writer;
ALTER TABLE customer OWNER TO app_owner;

-- Partitions, one of them in the tablespace outside of the data directory.
CREATE TABLE orders (
    id bigserial, day date NOT NULL, customer_id bigint REFERENCES customer, total numeric(12, 2), state text DEFAULT 'new'
) PARTITION BY RANGE (day);
CREATE TABLE orders_2024 PARTITION OF orders FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE orders_2025 PARTITION OF orders FOR VALUES FROM ('2025-01-01') TO ('2026-01-01') TABLESPACE ts_sales;
CREATE TABLE orders_rest PARTITION OF orders DEFAULT;
INSERT INTO orders (day, customer_id, total)
SELECT date '2024-01-01' + i % 1000, 1 + i % :customers, i % 100000 / 100.0 FROM generate_series(1, 5 * :customers) i;
CREATE INDEX ON orders (customer_id);
CREATE TABLE in_tablespace (id int PRIMARY KEY USING INDEX TABLESPACE ts_sales, t text) TABLESPACE ts_sales;
INSERT INTO in_tablespace SELECT i, md5(i::text) FROM generate_series(1, 2 * :customers) i;

CREATE UNLOGGED TABLE session_cache (k text PRIMARY KEY, v text);
INSERT INTO session_cache SELECT i::text, md5(i::text) FROM generate_series(1, 5000) i;

-- Values that lie outside of their rows, uncompressed; and large objects with a table that refers to them.
CREATE TABLE document (id int PRIMARY KEY, body bytea);
ALTER TABLE document ALTER body SET STORAGE EXTERNAL;
INSERT INTO document
SELECT n, (SELECT string_agg(sha512(int8send(n * 100000::bigint + j)), ''::bytea) FROM generate_series(1, 16384) j)
FROM generate_series(1, :documents) n;
SELECT count(lo_from_bytea(0, (SELECT string_agg(sha512(int8send(n * 1000::bigint + j)), ''::bytea) FROM generate_series(1, 1600) j)))
FROM generate_series(1, :large_objects) n;
CREATE TABLE attachment AS
SELECT oid AS object, 'file' || row_number() OVER (ORDER BY oid) AS name FROM pg_largeobject_metadata;
COMMENT ON TABLE attachment IS E'names of large objects;\n''quoted'' and \\ escaped';

CREATE TABLE audit (id bigserial PRIMARY KEY, at timestamptz DEFAULT '2024-01-01Z', what text);
CREATE FUNCTION note_update() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN INSERT INTO audit (what) VALUES (TG_OP || ' ' || TG_TABLE_NAME); RETURN NULL; END$$;
CREATE TRIGGER customer_updated AFTER UPDATE ON customer FOR EACH STATEMENT EXECUTE FUNCTION note_update();
UPDATE customer SET region = region WHERE id = 1;
CREATE FUNCTION total_of(customer bigint) RETURNS numeric LANGUAGE sql STABLE AS
    'SELECT sum(total) FROM orders WHERE customer_id = customer';
CREATE VIEW best_customers AS SELECT customer_id, sum(total) FROM orders GROUP BY 1 ORDER BY 2 DESC LIMIT 10;
GRANT SELECT ON best_customers TO app_reader;
CREATE SEQUENCE invoice START 1000 INCREMENT 5;
SELECT setval('invoice', 1005);
CREATE PUBLICATION customers FOR TABLE customer;
VACUUM (FREEZE, ANALYZE);
