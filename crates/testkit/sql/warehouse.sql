-- The big neighbour: wide rows in bulk. Variables: rows (of each fact table).
CREATE FUNCTION fact(i bigint, OUT id bigint, OUT at timestamptz, OUT customer_id int, OUT product_id int,
    OUT amount numeric(12, 2), OUT weight float8, OUT code text, OUT token text, OUT note text, OUT signature bytea)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT i, timestamptz '2020-01-01Z' + (i * 37 % 150000000) * interval '1 s',
           (hashint8extended(i, 1) & 1048575)::int, (hashint8extended(i, 2) & 65535)::int,
           ((hashint8extended(i, 4) & 16777215) / 100.0)::numeric(12, 2), ((hashint8extended(i, 5) & 1048575) / 1000.0)::float8,
           md5(i::text), encode(sha512(int8send(i)), 'base64'),
           (ARRAY['delivered to the front desk', 'held at the depot until the customer calls', 'returned: damaged in transit',
                  'partial shipment, remainder on back order', 'signed for by a neighbour'])[1 + i % 5]
               || ' / ' || (ARRAY['north', 'south', 'east', 'west'])[1 + i % 4] || ' region, clerk ' || i % 977 || ', batch ' || i / 1000,
           sha256(int8send(i + 77)) || sha384(int8send(i + 78)) || sha512(int8send(i + 79))
$$;
CREATE TABLE fact_orders AS SELECT f.* FROM generate_series(1::bigint, :rows) i, fact(i) f;
ALTER TABLE fact_orders ADD PRIMARY KEY (id);
CREATE INDEX ON fact_orders (customer_id);
-- The traffic updates here.
CREATE TABLE fact_events AS SELECT f.* FROM generate_series(10000000001::bigint, 10000000000 + :rows) i, fact(i) f;
ALTER TABLE fact_events ADD PRIMARY KEY (id);
CREATE TABLE fact_shipments (LIKE fact_orders) PARTITION BY HASH (id);
CREATE TABLE fact_shipments_0 PARTITION OF fact_shipments FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE fact_shipments_1 PARTITION OF fact_shipments FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO fact_shipments SELECT f.* FROM generate_series(20000000001::bigint, 20000000000 + :rows) i, fact(i) f;
CREATE MATERIALIZED VIEW sales_by_product AS
    SELECT product_id % 100 AS product_group, count(*), sum(amount) FROM fact_orders GROUP BY 1;
VACUUM (FREEZE, ANALYZE);
