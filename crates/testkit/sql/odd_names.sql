-- In a database whose name is no safe file name: names that need quoting everywhere.
CREATE SCHEMA "Sch.ema ""x""";
CREATE TABLE "Sch.ema ""x"""."ta\ble; -- 'é'" ("col umn" int PRIMARY KEY, "SELECT" text);
INSERT INTO "Sch.ema ""x"""."ta\ble; -- 'é'" SELECT i, 'row ' || i FROM generate_series(1, 100) i;
