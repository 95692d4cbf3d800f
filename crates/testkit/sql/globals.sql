-- Roles, the tablespace and the databases. Variables: tablespace (its directory).
CREATE ROLE app_owner LOGIN PASSWORD 'owner-pw';
CREATE ROLE app_reader;
CREATE ROLE app_writer;
CREATE ROLE alice LOGIN PASSWORD 'alice-pw' IN ROLE app_reader;
CREATE ROLE bob LOGIN IN ROLE app_writer CONNECTION LIMIT 5;
CREATE TABLESPACE ts_sales LOCATION :'tablespace';

CREATE DATABASE sales OWNER app_owner;
CREATE DATABASE crm OWNER app_owner TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-DE' LOCALE 'C.UTF-8';
CREATE DATABASE warehouse;
CREATE DATABASE empty;

COMMENT ON DATABASE sales IS 'orders and documents';
ALTER DATABASE sales SET search_path = public, extra;
ALTER ROLE alice IN DATABASE sales SET work_mem = '8MB';
ALTER ROLE app_reader SET statement_timeout = '10min';
