// A completion from a blinkimp server: cc -o client minimal_http.c && ./client 127.0.0.1 8000 'def read_file(path):'
// Prints the JSON of the reply (PROMPT without quotes or backslashes). Test: pytest tests/host/test_examples.py
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char** argv) {
  char body[4096], request[8192];
  struct addrinfo* address;
  if (argc != 4 || getaddrinfo(argv[1], argv[2], &(struct addrinfo){.ai_socktype = SOCK_STREAM}, &address)) return 2;
  int fd = socket(address->ai_family, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, address->ai_addr, address->ai_addrlen)) return perror("connect"), 1;
  int num_bytes = snprintf(body, sizeof body, "{\"prompt\": \"%s\", \"max_tokens\": 32, \"temperature\": 0}", argv[3]);
  snprintf(request, sizeof request, "POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", num_bytes, body);
  if (write(fd, request, strlen(request)) < 0) return perror("write"), 1;
  for (ssize_t n; (n = read(fd, body, sizeof body)) > 0;) fwrite(body, 1, n, stdout);
  return close(fd);
}
