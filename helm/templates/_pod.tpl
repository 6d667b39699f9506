{{/* Variables that the chart sets; extraEnv may set no other value for them. */}}
{{- define "mx.envNames" -}}
{{- $names := list -}}
{{- range (include "mx.env" . | fromYamlArray) -}}{{- $names = append $names .name -}}{{- end -}}
{{- join "," $names -}}
{{- end -}}

{{/* The environment of the server. */}}
{{- define "mx.env" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: HOME
  value: /tmp
- name: MX_SERVER_CONFIG
  value: /etc/modelexpress/config/server.yaml
- name: MODEL_EXPRESS_SERVER_HOST
  value: {{ .Values.listenAddress | quote }}
- name: MODEL_EXPRESS_SERVER_PORT
  value: "8001"
- name: MODEL_EXPRESS_HEALTH_PORT
  value: "8003"
- name: MODEL_EXPRESS_SERVER_METRICS_PORT
  value: "9401"
- name: MX_DRAIN_SECONDS
  value: {{ .Values.drainSeconds | quote }}
- name: MX_METADATA_URI
{{- if eq .Values.metadata.store "redis" }}
{{- if .Values.metadata.redis.secret }}
  valueFrom: {secretKeyRef: {name: {{ .Values.metadata.redis.secret }}, key: {{ .Values.metadata.redis.secretKey | quote }}}}
{{- else }}
  value: {{ .Values.metadata.redis.url | quote }}
{{- end }}
{{- else if eq .Values.metadata.store "kubernetes" }}
  value: {{ printf "kubernetes://%s" .Release.Namespace | quote }}
{{- else }}
  value: memory://
{{- end }}
{{- if .Values.cache.enabled }}
- name: MODEL_EXPRESS_CACHE_DIRECTORY
  value: /var/cache/modelexpress
- name: MX_CACHE_MAX_BYTES
  value: {{ include "mx.cacheMaxBytes" . | quote }}
- name: MX_SERVER_BULK_PORT
  value: {{ ternary "8002" "0" (eq (include "mx.bulk" .) "true") | quote }}
{{- with include "mx.replicaEndpoint" . }}
- name: MX_CACHE_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- if .Values.tls.enabled }}
- name: MX_TLS_CERT_PATH
  value: /etc/modelexpress/tls/tls.crt
- name: MX_TLS_KEY_PATH
  value: /etc/modelexpress/tls/tls.key
{{- if .Values.auth.mtls.caSecret }}
- name: MX_TLS_CA_PATH
  value: {{ printf "/etc/modelexpress/callers/%s" .Values.auth.mtls.caKey | quote }}
{{- else if include "mx.tlsSecretHasCa" . }}
- name: MX_TLS_CA_PATH
  value: /etc/modelexpress/tls/ca.crt
{{- end }}
{{- end }}
- name: MX_AUTH_MODE
  value: {{ ternary "off" .Values.auth.mode (eq .Values.auth.mode "none") | quote }}
{{- with .Values.auth.rights }}
- name: MX_AUTH_RIGHTS
  value: {{ toJson . | quote }}
{{- end }}
{{- if eq .Values.auth.mode "token" }}
- name: MX_AUTH_TOKENS_PATH
  value: {{ printf "/etc/modelexpress/tokens/%s" .Values.auth.token.key | quote }}
{{- if .Values.auth.token.ownSecret }}
- name: MX_AUTH_TOKEN_PATH
  value: {{ printf "/etc/modelexpress/own-token/%s" .Values.auth.token.ownKey | quote }}
{{- end }}
{{- end }}
{{- if eq .Values.auth.mode "kubernetes" }}
- name: MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES
  value: {{ join "," .Values.auth.kubernetes.audiences | quote }}
- name: MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS
{{- $accounts := .Values.auth.kubernetes.serviceAccounts }}
{{- if include "mx.ownAccountToken" . }}
{{- $accounts = append $accounts (printf "%s:%s" .Release.Namespace (include "mx.serviceAccount" .)) }}
{{- end }}
  value: {{ join "," (uniq $accounts) | quote }}
- name: MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS
  value: {{ .Values.auth.kubernetes.cacheSeconds | quote }}
{{- end }}
{{- if and .Values.auth.acceptPlaintextTokens (include "mx.replicaEndpoint" .) (has .Values.auth.mode (list "token" "kubernetes")) }}
- name: MX_AUTH_TOKEN_PLAINTEXT
  value: "1"
{{- end }}
{{- if .Values.credentials.googleKeySecret }}
- name: GOOGLE_APPLICATION_CREDENTIALS
  value: {{ printf "/etc/modelexpress/google/%s" .Values.credentials.googleKey | quote }}
{{- end }}
{{- if .Values.metrics.tokenSecret }}
- name: MX_METRICS_TOKEN_PATH
  value: {{ printf "/etc/modelexpress/metrics/%s" .Values.metrics.tokenKey | quote }}
{{- end }}
{{- end -}}

{{/* A probe of the server's health. Kubernetes probes gRPC since 1.24, and never over TLS. */}}
{{- define "mx.probe" -}}
{{- if semverCompare ">=1.24.0-0" .Capabilities.KubeVersion.Version -}}
grpc: {port: 8003}
{{- else -}}
tcpSocket: {port: 8003}
{{- end -}}
{{- end -}}

{{- define "mx.podTemplate" -}}
metadata:
  labels:
    {{- include "mx.labels" . | nindent 4 }}
    app.kubernetes.io/component: server
    {{ .Values.injection.namespaceLabel }}: disabled
    {{- if .Values.credentials.workloadIdentity.azureClientId }}
    azure.workload.identity/use: "true"
    {{- end }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: server
    modelexpress.io/config-digest: {{ toYaml .Values.config | sha256sum }}
    {{- with include "mx.serverMesh" . }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "mx.serviceAccount" . }}
  automountServiceAccountToken: {{ eq (include "mx.asksApi" .) "true" }}
  # Without it, Kubernetes would set MODEL_EXPRESS_SERVER_PORT to an address of the Service.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add .Values.deregistrationSeconds .Values.drainSeconds 15 }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and .Values.topologySpread.enabled (ne .Values.workload.kind "daemonset") }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ .Values.topologySpread.topologyKey }}
      whenUnsatisfiable: {{ .Values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "mx.selector" . | nindent 10 }}
          app.kubernetes.io/component: server
  {{- end }}
  {{- if and .Values.cache.enabled .Values.cache.prepareHostPath }}
  initContainers:
    - name: prepare-cache
      image: {{ include "mx.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [chown, {{ printf "%d:%d" (int (default 0 .Values.podSecurityContext.runAsUser)) (int (default 0 .Values.podSecurityContext.runAsGroup)) | quote }}, /var/cache/modelexpress]
      securityContext:
        runAsNonRoot: false
        runAsUser: 0
        runAsGroup: 0
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL], add: [CHOWN]}
      resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
      volumeMounts:
        - {name: cache, mountPath: /var/cache/modelexpress}
  {{- end }}
  containers:
    - name: server
      image: {{ include "mx.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve]
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      ports:
        - {name: grpc, containerPort: 8001, protocol: TCP}
        {{- if include "mx.bulk" . }}
        - {name: bulk, containerPort: 8002, protocol: TCP}
        {{- end }}
        - {name: health, containerPort: 8003, protocol: TCP}
        - {name: metrics, containerPort: 9401, protocol: TCP}
      env:
        {{- include "mx.env" . | nindent 8 }}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.credentials.secrets }}
      envFrom:
        {{- range . }}
        - secretRef: {name: {{ . }}}
        {{- end }}
      {{- end }}
      startupProbe:
        {{- include "mx.probe" . | nindent 8 }}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: {{ div (add .Values.probes.startupSeconds 1) 2 }}
      readinessProbe:
        {{- include "mx.probe" . | nindent 8 }}
        periodSeconds: {{ .Values.probes.periodSeconds }}
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        {{- include "mx.probe" . | nindent 8 }}
        periodSeconds: {{ .Values.probes.periodSeconds }}
        timeoutSeconds: 10
        failureThreshold: 6
      {{- if gt (int .Values.deregistrationSeconds) 0 }}
      lifecycle:
        preStop:
          # The server answers until no Service leads to it any more; then it drains.
          {{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
          sleep: {seconds: {{ .Values.deregistrationSeconds }}}
          {{- else }}
          exec: {command: [sleep, {{ .Values.deregistrationSeconds | quote }}]}
          {{- end }}
      {{- end }}
      {{- with .Values.resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - {name: config, mountPath: /etc/modelexpress/config, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- if .Values.cache.enabled }}
        - {name: cache, mountPath: /var/cache/modelexpress}
        {{- end }}
        {{- if .Values.tls.enabled }}
        - {name: tls, mountPath: /etc/modelexpress/tls, readOnly: true}
        {{- end }}
        {{- if .Values.auth.mtls.caSecret }}
        - {name: callers, mountPath: /etc/modelexpress/callers, readOnly: true}
        {{- end }}
        {{- if .Values.auth.token.secret }}
        - {name: tokens, mountPath: /etc/modelexpress/tokens, readOnly: true}
        {{- end }}
        {{- if .Values.auth.token.ownSecret }}
        - {name: own-token, mountPath: /etc/modelexpress/own-token, readOnly: true}
        {{- end }}
        {{- if include "mx.ownAccountToken" . }}
        - {name: account-token, mountPath: /var/run/secrets/tokens, readOnly: true}
        {{- end }}
        {{- if .Values.metrics.tokenSecret }}
        - {name: metrics-token, mountPath: /etc/modelexpress/metrics, readOnly: true}
        {{- end }}
        {{- if .Values.credentials.googleKeySecret }}
        - {name: google-key, mountPath: /etc/modelexpress/google, readOnly: true}
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "mx.server" . }}}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- if and .Values.cache.enabled (not (and (eq .Values.workload.kind "statefulset") (eq .Values.cache.volume "claim"))) }}
    - name: cache
      {{- if eq .Values.cache.volume "emptyDir" }}
      emptyDir: {sizeLimit: {{ .Values.cache.size }}}
      {{- else if eq .Values.cache.volume "hostPath" }}
      hostPath: {path: {{ .Values.cache.hostPath | quote }}, type: DirectoryOrCreate}
      {{- else }}
      persistentVolumeClaim: {claimName: {{ ternary .Values.cache.existingClaim (printf "%s-cache" (include "mx.server" .)) (eq .Values.cache.volume "existingClaim") }}}
      {{- end }}
    {{- end }}
    {{- if .Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "mx.tlsSecret" . }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.auth.mtls.caSecret }}
    - name: callers
      secret: {secretName: {{ .Values.auth.mtls.caSecret }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.auth.token.secret }}
    - name: tokens
      secret: {secretName: {{ .Values.auth.token.secret }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.auth.token.ownSecret }}
    - name: own-token
      secret: {secretName: {{ .Values.auth.token.ownSecret }}, defaultMode: 0440}
    {{- end }}
    {{- if include "mx.ownAccountToken" . }}
    - name: account-token
      projected:
        sources:
          - serviceAccountToken: {path: modelexpress, audience: {{ first .Values.auth.kubernetes.audiences | quote }}, expirationSeconds: 3600}
    {{- end }}
    {{- if .Values.metrics.tokenSecret }}
    - name: metrics-token
      secret: {secretName: {{ .Values.metrics.tokenSecret }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.credentials.googleKeySecret }}
    - name: google-key
      secret: {secretName: {{ .Values.credentials.googleKeySecret }}, defaultMode: 0440}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
